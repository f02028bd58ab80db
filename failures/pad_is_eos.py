"""The end token doubles as the padding token, and padding is masked out of the loss: the end is never
trained, the model never stops.

    python failures/pad_is_eos.py config/sft_toy.py --out_dir=out-exp/pad_is_eos
The loss looks fine, even better. Seen only by whoever looks at the share of answers that end, and at
their length.
"""
from stage import run

run('sft.py', 'sft.py', '    ids, trained = encode_row(row, tok)\n',
    '    ids, trained = encode_row(row, tok); trained = [t and i != tok.eot for i, t in zip(ids, trained)]\n')
