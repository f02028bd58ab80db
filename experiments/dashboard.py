"""A folder of runs as its files tell, and its dashboard as HTML: tables, curves, report cards of reward
models, over-optimisation, failures. app.py shows it; `python app.py --report=out/report.html` writes it.

    run = RunFolder('.', 'out-ppo')         # run.state, run.rows, run.series('kl')
    html = dashboard('.', find_runs('.'))
"""
import functools
import html
import io
import math
import os
import re
import time

import evaluate
import files
from data.labels import parse, read_rows, text_in
from failures import gallery
from rollout import load_reward
from run import SHOWN

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SKIP = {'node_modules', '__pycache__', 'venv', 'tests', 'assets', 'uploads', 'annotations'}
GOLD = os.path.join(HERE, 'data', 'toy', 'gold.py')
COLOURS = ('#2563eb', '#dc2626', '#16a34a', '#d97706', '#9333ea', '#0891b2', '#db2777', '#65a30d', '#78716c')
CARD = {
    'accuracy': '{accuracy:.1%}', '95 %': '{accuracy_95[0]:.1%} to {accuracy_95[1]:.1%}', 'pairs': '{pairs}',
    'ECE': '{ece:.3f}', 'length correlation': '{length_correlation:+.2f}',
    'longer is chosen': '{longer_is_chosen:.0%}'}
INK = '#0a0b0c'  # replaced by the colour of the page's text: one picture for light and dark
LOOKS = {
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), INK),
    **dict.fromkeys(('axes.spines.top', 'axes.spines.right', 'legend.frameon', 'text.parse_math'), False),
    'svg.fonttype': 'none', 'axes.grid': True, 'grid.alpha': 0.2, 'axes.titlelocation': 'left',
    'axes.titlesize': 11, 'font.size': 10, 'legend.fontsize': 9}
METRICS = ('score', 'kl', 'loss', 'accuracy', 'len', 'clip_frac', 'entropy', 'ended', 'tok_per_s')


def esc(text) -> str:
    """Text of a model or a file as HTML: it reaches the page in no other way."""
    return html.escape(str(text), quote=True)


# -----------------------------------------------------------------------------------------------------------
# paths, and the files of a run


def inside(root: str, path: str) -> str:
    """Absolute path of `path` (relative ones start at root), links followed. ValueError outside of root."""
    root = os.path.realpath(root)
    full = os.path.realpath(os.path.join(root, str(path)))
    if os.path.commonpath([root, full]) != root:
        raise ValueError(f'{path} is outside the folder of this app: put the file into it, '
                         'or start with --folder=... around both')
    return full


def kept(root: str, *parts) -> str:
    """Path of a file of the folder; '' (which opens as no file at all) where a link leads out of it."""
    try:
        return inside(root, os.path.join(*parts))
    except ValueError:
        return ''


def finite(x) -> bool:
    """Is a field of a log a number that can be drawn? NaN, infinity, True and 10 ** 400 are not."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -1e300 < x < 1e300


def read_json(path: str) -> dict:
    """The object in a .json; {} where there is none, or half of one."""
    try:
        with open(path, encoding='utf-8') as f:
            return parse(f.read()) or {}
    except (OSError, ValueError):
        return {}


def tail(path: str, size: int = 4000) -> str:
    """The last `size` bytes of a console in whole lines, without colours; a progress bar's last state."""
    try:
        with open(path, 'rb') as f:
            start = max(0, f.seek(0, 2) - size)
            f.seek(start)
            lines = re.sub(r'\x1b\[[\d;]*m', '', f.read().decode('utf-8', 'replace')).split('\n')
    except OSError:
        return ''
    if start and len(lines) > 1:
        lines = lines[1:]
    return '\n'.join(line.rsplit('\r', 1)[-1] for line in lines)


def held(path: str) -> bool:
    """Does a living process hold the lock that this file stands for?"""
    try:
        if os.path.exists(path):
            files.locked(path, wait=False).close()
    except BlockingIOError:
        return True
    except OSError:  # not ours to open
        return False
    return False


class RunFolder:
    """What the files of a run's folder say: stage, config, rows (train and eval), console, state and a word
    on it. Bad files never raise; a path outside of root does."""

    def __init__(self, root, name):
        self.root, self.name, self.path = root, name, inside(root, name)
        self.info = read_json(self.file('run.json'))
        self.console = tail(self.file('console.txt')).strip()
        rows, self.broken = read_rows(self.file('log.jsonl'))
        self.config = next((row for row in rows if row.get('split') == 'config'), {})
        self.stage = self.config.get('stage', self.info.get('stage', '?'))
        self.rows = [row for row in rows if row.get('split') in ('train', 'eval') and finite(row.get('time'))
                     and type(row.get('step')) is int and finite(row['step'])]
        self.last = self.rows[-1]['step'] if self.rows else 0
        self.changed = os.path.getmtime(self.file('log.jsonl')) if self.has('log.jsonl') else 0
        self.total = self._total()
        self.state, self.note = self._state()

    def file(self, name):
        return kept(self.root, self.name, name)

    def has(self, name):
        return os.path.exists(self.file(name))

    def _total(self):
        """How many iterations it is to make: max_iters, or (given epochs) what the script printed."""
        asked = self.config.get('max_iters')
        if finite(asked) and asked >= 1:
            return int(asked)
        printed = re.findall(r'(?:iter \d+/|; (?=\d+ iterations))(\d+)', self.console)
        return max([self.last, *map(int, printed)])

    def _state(self):
        """(state, word). Who runs holds a lock, which the kernel gives back however a process ends."""
        if held(self.file('.app.lock')):
            return 'running', ''
        if held(self.file('.lock')):  # run.py's
            return 'running', 'started elsewhere'
        said = self.console.rsplit('\n$ ', 1)[-1]  # since the last start
        words = said.split('\n')[-1][:400]
        if words.startswith('done:'):
            return 'finished', ''
        if re.match('stopped after|interrupted|KeyboardInterrupt', words):
            return 'stopped', f'stopped at iteration {self.last}'
        if re.search(r'^error: |^Traceback |Error: ', said[-2000:], re.M):
            return 'crashed', words
        if self.rows and self.last >= self.total > 0 and self.rows[-1]['split'] == 'eval':
            return 'finished', ''
        if not self.rows:
            return 'empty', 'its log holds no row that can be read' if self.has('log.jsonl') else 'no log yet'
        of = f' of {self.total}' if self.total else ''
        return 'incomplete', f'ends at iteration {self.last}{of}; resume goes on from its checkpoint'

    def pace(self):
        """Seconds an iteration, of the last 20; 0 when unknown."""
        last = [row for row in self.rows if row['split'] == 'train'][-20:]
        if len(last) < 2:
            return 0.0
        return (last[-1]['time'] - last[0]['time']) / max(1, last[-1]['step'] - last[0]['step'])

    def series(self, metric, x='step', split='train'):
        """([x], [y]) of a metric: x 'step' | 'time' | 'kl'; what is no finite number is left out."""
        points = [(row[x], row[metric]) for row in self.rows
                  if row['split'] == split and finite(row.get(x)) and finite(row.get(metric))]
        if x == 'kl':
            points.sort()
        return [a for a, _ in points], [b for _, b in points]

    def samples(self):
        """{iteration: [sample]} of the answers that a run kept at its evaluations, in their order."""
        out = {}
        for row in read_rows(self.file('samples.jsonl'))[0]:
            if type(row.get('step')) is int and finite(row['step']) and text_in(row, 'prompt', 'completion'):
                out.setdefault(row['step'], []).append(row)
        return dict(sorted(out.items()))

    def over_optimisation(self):
        """[(step, sqrt KL, proxy, gold)] at each evaluation: proxy and KL from the log, the gold mark from
        the samples (toy prompts only)."""
        toy, gold, out = toy_rows(self.root), load_reward(GOLD), []
        samples = self.samples() if toy else {}
        for row in self.rows:
            said = [s for s in samples.get(row['step'], ()) if s['prompt'] in toy]
            if row['split'] == 'eval' and said and finite(row.get('kl')) and finite(row.get('score')):
                marks = [gold(s['prompt'], s['completion'].replace(gallery.END, ''), toy[s['prompt']])
                         for s in said]
                mean = sum(marks) / len(marks)
                out.append((row['step'], math.sqrt(max(row['kl'], 0.0)), row['score'], mean))
        return out

    def made_by(self, tab):
        """Did this tab make the run that lies here? One started since with other settings is not its own."""
        keys = self.info.get('keys')
        if self.info.get('by') != tab or not isinstance(keys, dict):
            return False
        return all(self.config.get(key) == value for key, value in keys.items())


def folders(root: str, depth: int = 3):
    """(folder relative to root, its file names), down to `depth`; without hidden ones and environments."""
    for path, dirs, names in os.walk(root):
        here = os.path.relpath(path, root)
        level = 0 if here == '.' else here.count(os.sep) + 1
        dirs[:] = sorted(d for d in dirs if not d.startswith('.') and d not in SKIP and level < depth)
        if level:
            yield here, set(names)


def find_runs(root: str) -> list:
    """Every folder with a log or a run.json, the one that wrote last first."""
    found = [RunFolder(root, name) for name, names in folders(root) if names & {'log.jsonl', 'run.json'}]
    return sorted(found, key=lambda run: -run.changed)


# -----------------------------------------------------------------------------------------------------------
# pictures and tables


def unit(key: str) -> str:
    """A metric with its unit, as the console has it: 'kl' -> 'kl nats/seq'."""
    return re.sub(r'\{.*?\}', '', SHOWN.get(key, key)).replace('  ', ' ')


def smooth(ys, a: float) -> list:
    """Exponential moving average without the bias of its start; a = 0 is none. [1, 3], 0.5 -> [1, 2.333]."""
    out, total, weight = [], 0.0, 0.0
    for y in ys:
        total, weight = a * total + (1 - a) * y, a * weight + (1 - a)
        out.append(total / weight)
    return out


def picture(title, xlabel, ylabel, draw) -> str:
    """An SVG that draw(axes) fills. Text stays text, its colour is the page's."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('the pictures need matplotlib: pip install -r requirements-app.txt') from None
    matplotlib.rcParams.update(LOOKS)
    figure, out = Figure(figsize=(4.7, 3.1), layout='constrained'), io.StringIO()
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
    draw(axes)
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(loc='outside lower center', ncols=1 if max(map(len, labels)) > 24 else 2)
    figure.savefig(out, format='svg', transparent=True)
    return out.getvalue().partition('<svg')[2].join(['<svg', '']).replace(INK, 'currentColor')


def curves(runs, metric, x='step', smoothing=0.0) -> str:
    """One metric of all runs, overlaid: train as a line, eval as dots. '' when no run has it."""
    coloured = list(zip(runs, COLOURS * len(runs)))  # a run has one colour in all pictures of a page
    coloured = [(run, colour) for run, colour in coloured
                if run.series(metric, x)[0] or run.series(metric, x, 'eval')[0]]

    def draw(axes):
        for run, colour in coloured:
            xs, ys = run.series(metric, x)
            axes.plot(xs, smooth(ys, smoothing), color=colour, lw=1.3, label=run.name)
            if smoothing:
                axes.plot(xs, ys, color=colour, lw=0.7, alpha=0.25)
            axes.plot(*run.series(metric, x, 'eval'), 'o', color=colour, ms=4)
    return picture(metric, unit(x), unit(metric), draw) if coloured else ''


def table_html(head, rows, caption='') -> str:
    """A table; on a telephone (CSS) a row is a block of "head: cell" lines. Cells are text, never markup."""
    lines = ['<tr>' + ''.join(f'<th>{esc(name)}</th>' for name in head) + '</tr>']
    for row in rows:
        cells = [f'<td data-head="{esc(name)}">{esc(cell)}</td>' for name, cell in zip(head, row)]
        lines.append(f'<tr>{"".join(cells)}</tr>')
    return f'<p class=note>{esc(caption)}</p><div class=scroll><table>{"".join(lines)}</table></div>'


def report_card(run) -> str:
    """Accuracy, ECE, length correlation of a reward model, its rewards and how calibrated it is, out of its
    report.json. '' without a whole one."""
    card = read_json(run.file('report.json'))
    try:
        cells = {head: form.format(**card) for head, form in CARD.items()}
        bars, bins = card['histogram'], card['reliability']

        def rewards(axes):
            for key, colour in zip(('chosen', 'rejected'), COLOURS):
                axes.stairs(bars[key], bars['edges'], fill=True, alpha=0.45, color=colour, label=key)

        def reliability(axes):
            axes.plot([0.5, 1], [0.5, 1], '--', color='#888888', lw=1, label='calibrated')
            axes.plot([row[3] for row in bins], [row[4] for row in bins], 'o-', label=run.name)
        plots = (picture(f'{run.name}: rewards', 'reward', 'answers', rewards)
                 + picture('Reliability', 'confidence in its choice', 'how often right', reliability))
    except (KeyError, TypeError, ValueError, IndexError):
        return ''
    table = table_html(['reward model', *cells], [[run.name, *cells.values()]],
                       'Report card of the reward model, on held-out pairs')
    return f'{table}<div class=plots>{plots}</div>'


def toy_rows(root) -> dict:
    """{prompt: row} of the toy world in the folder, which its gold scorer can mark; it has seen no
    training."""
    found = {}
    for part in ('test', 'val', 'train'):
        for row in read_rows(kept(root, 'data', 'toy', f'prompts_{part}.jsonl'))[0]:
            if text_in(row, 'prompt', 'family', 'want'):
                if row['family'] != 'story' or len(row['want'].split()) == 2:
                    found[row['prompt']] = row
    return found


def win_rates(root, path, against='sft') -> dict:
    """{model: (share, low, high)}: how often its answer to a prompt gets a better gold mark than `against`'s,
    an equal one half, as evaluate.py counts."""
    toy, out = toy_rows(root), {}
    rows = [row for row in read_rows(path)[0] if text_in(row, 'prompt', against) and row['prompt'] in toy]
    for name in {key for row in rows for key in row} - {'prompt', against}:
        both = [row for row in rows if text_in(row, name)]
        asked = [toy[row['prompt']] for row in both]
        ours, theirs = ([row[key] for row in both] for key in (name, against))
        ours, theirs = (evaluate.Answers(texts, [True] * len(texts), 0.0) for texts in (ours, theirs))
        worth = dict(wins=1.0, losses=0.0, ties=0.5)
        if both:
            out[name] = evaluate.interval([worth[end] for end in evaluate.compare(GOLD, asked, ours, theirs)])
    return out


def memory_of(run) -> str:
    """The largest peak that a run printed (a resumed one prints several); '–' where nobody kept it."""
    peaks = re.findall(r'peak memory ([\d.]+) GB', tail(run.file('console.txt'), 1 << 20))
    return f'{max(map(float, peaks)):.2f} GB' if peaks else '–'


def comparison(root) -> tuple:
    """(table, plot) of data/toy/report.py's report.json and samples.jsonl, with win rates, tokens trained on
    and memory. '' without one."""
    tables = plots = ''
    for folder, names in folders(root):
        marks = read_json(kept(root, folder, 'report.json')) if 'report.json' in names else {}
        marks = {name: row for name, row in marks.items() if isinstance(row, dict) and 'gold' in row}
        wins = win_rates(root, kept(root, folder, 'samples.jsonl')) if marks else {}
        columns = list(dict.fromkeys(key for row in marks.values() for key in row))
        rows = []
        for name, row in marks.items():
            numbers = [f'{row[key]:.3g}' if finite(row.get(key)) else '–' for key in columns]
            won = '{:.0%} ({:.0%} to {:.0%})'.format(*wins[name]) if name in wins else '–'
            # out-seed2 stands beside out-ppo-seed2
            stem = re.sub(r'[^\w.-]', '_', name).replace('dpo_lora', 'lora')
            run = RunFolder(root, f'out-{stem}{folder.removeprefix("out")}')
            tokens = sum(log['tokens'] for log in run.rows if finite(log.get('tokens')))
            rows.append((name, *numbers, won, f'{tokens:,}' if tokens else '–', memory_of(run)))
        if rows:
            head = ('model', *columns, 'wins against SFT (95 %)', 'tokens trained', 'peak memory')
            tables += table_html(
                head, rows, f'The models of {folder} on held-out prompts: gold of 0 to 10, KL in nats, '
                'length in tokens. Win: a better gold mark than the SFT model on the same prompt, equal '
                'marks half')
            plots += picture(f'{folder}: gold and proxy of each model', 'sqrt(KL to SFT)',
                             'gold ●, reward model ▲', functools.partial(draw_models, marks))
    return tables, plots


def draw_models(marks, axes):
    for (name, row), colour in zip(marks.items(), COLOURS * len(marks)):
        if all(finite(row.get(key)) for key in ('kl', 'gold', 'reward')):
            x = math.sqrt(max(row['kl'], 0))
            axes.plot(x, row['gold'], 'o', color=colour, label=name)
            axes.plot(x, row['reward'], '^', color=colour, alpha=0.5)


def over_optimisation_plots(runs) -> str:
    """Proxy and gold against sqrt KL, Gao et al. 2022 (2210.10760) figure 1: where gold turns down while the
    proxy climbs, the model games its judge."""
    out = ''
    for run in runs:
        points = run.over_optimisation() if run.stage in ('ppo', 'grpo') else []

        def draw(axes):
            _, x, proxy, gold = zip(*points)
            axes.plot(x, proxy, 'o-', color=COLOURS[0], label='proxy: reward trained on')
            axes.plot(x, gold, 's-', color=COLOURS[3], label='gold, 0 to 10')
        if len(points) > 1:
            out += picture(f'{run.name}: over-optimisation', 'sqrt(KL to where it started)', 'mark', draw)
    return out


def evidence_html(seen) -> str:
    def draw(axes):
        for label, (xs, ys) in seen['curves'].items():
            axes.plot(xs, ys, 'o-' if len(xs) < 12 else '-', ms=4, lw=1.3, label=label)
        if all(y >= 0 for _, ys in seen['curves'].values() for y in ys):
            axes.set_ylim(bottom=0)
    svg = picture(seen['run'], 'iteration', unit(seen['metric']), draw)
    return f'<div class=plots>{svg}<pre>{esc(seen["text"])}</pre></div>'


def failures_html(runs) -> str:
    """Each failure with why, a curve and a text: of a run that shows it, else of the one that was kept."""
    out = ''
    for name, known in gallery.known().items():
        hit = next((run for run in runs if gallery.seen_in(run, name)), None)
        word = f'Not seen in these runs. Recorded from <code>{esc(known["how"])}</code>'
        if hit:
            known |= gallery.evidence(hit, known['metric'])
            word = f'<b>Seen in {esc(hit.name)}</b>'
        out += (f'<section><h3>{esc(name)}</h3><p>{esc(known["why"])}</p><p>{word}</p>'
                f'{evidence_html(known)}</section>')
    return out


def runs_html(runs) -> str:
    rows = []
    for run in runs:
        of = f'{run.last}/{run.total}' if run.total else run.last
        broken = f' ({run.broken} broken log lines left out)' if run.broken else ''
        seconds = f'{run.rows[-1]["time"]:.0f}' if run.rows else '–'
        rows.append((run.name, run.stage, run.state, of, seconds, run.note + broken))
    if not rows:
        return '<p>No runs in this folder yet: start one in the tab Train, or run bash quickstart.sh.</p>'
    return table_html(('run', 'stage', 'state', 'iteration', 'seconds', 'note'), rows)


def dashboard(root, runs=None, metrics=METRICS, x='step', smoothing=0.6) -> str:
    """The whole page as HTML: runs, over-optimisation, curves, report cards, failures."""
    runs = find_runs(root) if runs is None else runs
    table, plots = comparison(root)
    hacking = over_optimisation_plots(runs)
    drawn = ''.join(curves(runs, metric, x, smoothing) for metric in metrics)
    cards = ''.join(report_card(run) for run in runs if run.stage == 'reward')
    parts = [
        ('Runs', runs_html(runs), ''),
        ('Before and after', table, 'No table yet: data/toy/report.py writes it, as quickstart.sh does.'),
        ('Over-optimisation', plots + hacking,
         'Needs a ppo or grpo run on toy prompts with two evaluations and a KL in its log.'),
        ('Curves', drawn, 'Nothing to draw: no run has logged any of these.'),
        ('Reward model', cards, 'No report of a reward model yet.'),
        ('Failures and why', failures_html(runs), '')]
    out = ''
    for title, part, without in parts:
        part = f'<div class=plots>{part}</div>' if part.startswith('<svg') else part
        out += f'<h2>{title}</h2>' + (part or f'<p class=note>{without}</p>')
    return out


REPORT = '<!doctype html><html lang=en><meta charset=utf-8><title>plainRLHF report</title>'


def may_write(root, path, ending, ours) -> str:
    """Absolute path for a file that the page writes: a new one, or an older one of ours, which begins with
    `ours`. ValueError for another ending, or for anything else that lies there."""
    full = inside(root, path)
    if not full.endswith(ending):
        raise ValueError(f'{path}: a name that ends in {ending} is wanted')
    if os.path.lexists(full):
        with open(full, 'rb') as f:
            if f.read(len(ours)) != ours.encode():
                raise ValueError(f'{path} is there already, and no report of this app: give another name')
    os.makedirs(os.path.dirname(full), exist_ok=True)
    return full


def styles() -> str:
    return STYLES


def write_report(root, path) -> str:
    """The dashboard as one HTML file: pictures inlined, no script, nothing loaded from anywhere."""
    path = may_write(root, path, '.html', REPORT)
    body = dashboard(root)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    with files.replaced(path, 'w') as f:
        f.write(f'{REPORT}<meta name=viewport content="width=device-width,initial-scale=1">'
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
                f'<style>{STYLES}{REPORT_STYLES}</style>'
                '<body class=page><h1>plainRLHF: what the runs did</h1>'
                f'<p class=note>written {time.strftime("%Y-%m-%d %H:%M")}</p>{body}')
    return path


STYLES = '''
:root{--block-info-text-color:#52525b}
.dark{--block-info-text-color:#a1a1aa}
.dark input:is([type=checkbox],[type=radio]){border-color:#a1a1aa!important}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:12px;
align-items:start}
.plots svg{width:100%;max-width:560px;height:auto;color:inherit}
.scroll{overflow-x:auto;margin:8px 0}
.scroll table{border-collapse:collapse;font-size:14px;width:auto;color:inherit}
.scroll td,.scroll th{padding:4px 10px;border:0!important;border-bottom:1px solid #8886!important;
text-align:left;white-space:nowrap}
.scroll table,.scroll tr,.scroll tbody{border:0!important}
.scroll td:first-child,.scroll td:last-child{white-space:normal;overflow-wrap:anywhere;min-width:90px}
.scroll td:nth-child(6):last-child{min-width:220px}
.note{font-size:13px;opacity:.8}
.answer,.bubble{white-space:pre-wrap;overflow-wrap:anywhere}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:10px}
.side>div{border:1px solid #8886;border-radius:8px;padding:8px 10px;min-width:0}
.side h4{margin:0 0 6px}
.bubble{border-radius:8px;padding:6px 9px;margin:4px 0;background:#2563eb33}
.bad{color:#dc2626;white-space:pre-wrap;overflow-wrap:anywhere}
.on{background:#16a34a44}
.off{opacity:.65}
.page pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8882;border-radius:8px;padding:8px;
font-size:13px;max-height:380px;overflow-y:auto}
[data-testid=status-tracker] .error,[data-testid=status-tracker] .clear-status{display:none}
#chat .icon-button-wrapper{display:none}
.label-wrap{text-align:left!important;gap:8px}
.label-wrap .icon{flex:none;align-self:center}
.label-wrap>span:first-child{flex:1;min-width:0;overflow-wrap:anywhere}
.page h2{margin:18px 0 6px;font-size:20px}
.page h3{margin:12px 0 4px;font-size:16px}
.page p{margin:4px 0;max-width:80ch}
.page code{overflow-wrap:anywhere}
@media(max-width:480px){
.tab-container button,.tab-wrapper button{padding:0 6px!important;font-size:13px!important}
main.fillable,.gradio-container main{padding:8px!important}
.scroll table,.scroll tbody,.scroll tr,.scroll td{display:block;width:100%}
.scroll tr:has(th){display:none}
.scroll tr{padding:6px 0;border-bottom:1px solid #8886!important}
.scroll td{padding:1px 4px;border:0!important;white-space:normal!important;overflow-wrap:anywhere;
min-width:0!important;box-sizing:border-box}
.scroll td:empty{display:none}
.scroll td::before{content:attr(data-head) ": ";opacity:.7}
.scroll td:first-child{font-weight:600}
.scroll td:first-child::before{content:""}}
'''
REPORT_STYLES = '''
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1240px;padding:12px}
body{color:#111;background:#fff}
@media(prefers-color-scheme:dark){body{color:#eee;background:#16181d}}
'''
