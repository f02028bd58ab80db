"""Every speed figure that the README states, each by one command; every figure is a ratio to a named peer in the same run.

    python bench.py kernels | data | infer | actors | parallel | train      # one section
    python bench.py all                                                     # all of them, one after the other

A peer that is not installed is named and skipped. Machines are noisy: sides alternate, the median of the rounds counts.
"""
import sys


def alternate(sides, rounds=3):
    """{name: fn() -> rate} run in turn `rounds` times -> {name: median rate}. Turns, not blocks: drift hits all sides."""
    seen = {name: [] for name in sides}
    for _ in range(rounds):
        for name, fn in sides.items():
            seen[name].append(fn())
    return {name: sorted(rates)[len(rates) // 2] for name, rates in seen.items()}


# one function a section, `bench_<section>(args)`, args = the words behind the section's name

if __name__ == '__main__':
    sections = {k[len('bench_'):]: v for k, v in globals().items() if k.startswith('bench_')}
    if len(sys.argv) < 2 or sys.argv[1] not in [*sections, 'all']:
        print(f'{__doc__}\nsections: {", ".join(sections)}', file=sys.stderr)
        sys.exit(2)
    for _name in sections if sys.argv[1] == 'all' else [sys.argv[1]]:
        sections[_name](sys.argv[2:])
