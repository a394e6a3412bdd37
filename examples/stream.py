"""Serve several prompts at once and print each answer as it grows."""

import asyncio

from autodeploy import LLM, SamplingParams
from autodeploy.cli import DEMO_MODEL


async def ask(llm: LLM, prompt: str) -> None:
    async for output in llm.generate_async(prompt, SamplingParams(max_tokens=8), streaming=True):
        print(f"{prompt}{output.outputs[0].text}")


async def main() -> None:
    with LLM(DEMO_MODEL) as llm:
        await asyncio.gather(*(ask(llm, prompt) for prompt in ("123+456=", "250+250=", "600+399=")))


asyncio.run(main())
