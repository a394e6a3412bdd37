"""The processes of `autodeploy bench`. `python FOLDER NAME` runs `worker_NAME.py`, in any environment that has that engine.

These files import nothing of each other. Those of other engines import nothing of autodeploy.
"""
