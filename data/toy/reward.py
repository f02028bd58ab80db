"""Reward of toy arithmetic for grpo.py and ppo.py: 1 when the last number of the answer is the sum, else 0.

Evaluation uses the same function, so base and trained models are read by the same eyes. An answer without a
full stop after its number was cut off and counts 0: '... 7' could have become 75.
"""
import re


def extract_answer(text):
    """The last whole number of a finished answer, or None. '4+2+1=7, 75. Sure!' -> '75'; '7.5.' -> None"""
    found = re.findall(r'(?<![\d.])\d{1,99}(?=[.!?](?!\d))', text)
    return str(int(found[-1])) if found else None


def reward(prompt: str, completion: str, row: dict) -> float:
    """1.0 or 0.0. reward('Q: 47+28?\\nA: ', '7+8=15, 4+2+1=7, 75.', {'answer': '75'}) -> 1.0"""
    return float(extract_answer(completion) == str(row['answer']))
