"""`autodeploy bench`: how fast a model is served, and how fast others serve it on the same machine in the same minutes.

Every engine, ours too, works in a process of its own (`workers/`) that is told by JSON lines what to do and answers with the
times of its tokens; all arithmetic is done here, on these times. Nothing here loads torch.
"""
