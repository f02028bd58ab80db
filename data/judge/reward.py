"""A judge as a reward: does a model behind an OpenAI-compatible endpoint prefer the answer to the row's own?

    python serve.py --init_from=Qwen/Qwen3-4B --port=8000           # or any other server
    JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=qwen3 python grpo.py ... --reward=data/judge/reward.py

Rows {"prompt", "chosen"} or {"prompt", "completion"}: what the answer is compared with. Both orders are
asked (see data/judge.py): 1 when the answer wins in both, 0 when it loses in both, 1/2 otherwise; a judge
that only likes the first place pays everybody alike. An answer that the judge cannot be asked about (too
long, say) gets 0. A server that is down is an error: the reward is tried again, then the prompt is dropped
(reward_retries). JUDGE_KEY: the endpoint's key.
"""
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.judge import ask_judge


def text_of(answer) -> str:
    """An answer as text: a string, or the messages that a data set has there."""
    return answer if isinstance(answer, str) else '\n\n'.join(str(m.get('content')) for m in answer)


def reward(prompt, completion: str, row: dict) -> float:
    """1, 1/2 or 0: see the top of this file."""
    other = row.get('chosen') or row.get('completion')
    if not other:
        raise ValueError('no "chosen" or "completion": the row has nothing that the answer could be '
                         'compared with')
    url = os.environ.get('JUDGE_URL', '')
    how = dict(model=os.environ.get('JUDGE_MODEL', 'judge'), key=os.environ.get('JUDGE_KEY', ''), tries=3)
    verdicts, _ = ask_judge(url, prompt, completion, text_of(other), **how)
    if set(verdicts) == {None}:
        return 0.0
    wins = (verdicts[0] == 'A') + (verdicts[1] == 'B')
    losses = (verdicts[0] == 'B') + (verdicts[1] == 'A')
    return 1.0 if wins == 2 else 0.0 if losses == 2 else 0.5
