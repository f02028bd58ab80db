# Poor man's configurator (nanoGPT's idea): exec'd at the top of every script, imported by nobody.
#
#     python ppo.py config/ppo_gpt2.py --batch_size=32 --compile     # file(s) first, then keys; later wins
#
# The caller has its config as plain globals, their names in `config_keys`. A config file is Python. It has a
# namespace of its own that holds the keys with their values so far: it may compute (`max_iters // 2`) but can
# not clobber a function of the script. Its helper names start with an underscore.
#
# A key's comment begins with its range where it has one, and the range ends with a colon:
#
#     batch_size = 64 # >= 1: rows an iteration          beta1 = 0.9 # in [0, 1): decay of the first moment
#     kl_kind = 'k1' # one of 'k1', 'k2', 'k3': estimator of the KL
#
# This is the gate. A mistake of the user ends in one line on stderr and exit code 2, before anything loads:
# an unknown key, a wrong type, a number outside its range, a slip in a config file. So does every ValueError
# or OSError that our own files raise later. Any other exception keeps its traceback: that is a bug.
# (comments, not a docstring: exec would put it in the place of the script's own __doc__, which --help prints)
if __name__ in ('__main__', '__mp_main__'):  # '__mp_main__': a spawned worker; `import ppo` does nothing
    import ast, builtins, difflib, math, re, sys, traceback, types
    from os import path as _path

    for _stream in (sys.stdout, sys.stderr):
        if hasattr(_stream, 'reconfigure'):  # a sample with an umlaut must not end a run on an ASCII terminal
            _stream.reconfigure(errors='backslashreplace')

    def _die(message):
        print(f'error: {message}', file=sys.stderr, flush=True)
        sys.exit(2)

    def _excepthook(kind, error, tb, root=globals().get('_root') or _path.dirname(_path.abspath(__file__))):
        frames = traceback.extract_tb(tb)
        ours = frames and _path.dirname(_path.abspath(frames[-1].filename)).startswith(root)
        if issubclass(kind, KeyboardInterrupt):
            again = '--init_from=resume continues the run' if 'init_from' in config_keys else 'run it again'
            print(f'\ninterrupted; {again}', file=sys.stderr)
            sys.exit(130)
        if (issubclass(kind, ValueError) and ours) or (issubclass(kind, OSError) and error.errno):
            _die(' '.join(str(error).split()))
        sys.__excepthook__(kind, error, tb)

    def _read(file):
        """A script or config: UTF-8, Python's own encoding, whatever the locale says; a BOM is skipped."""
        with open(file, encoding='utf-8-sig') as f:
            return f.read()

    def _comment(key):
        """What stands behind `key = default #`; '' where there is nothing."""
        default = r'''(?:'[^'\n]*'|"[^"\n]*"|[^#'"\n])*'''
        found = re.search(rf'^ *{key} = {default}#\s*(.*)$', _source, re.M)
        return found[1] if found else ''

    def _range(key):
        """What the key's comment begins with: '>= 1', 'in [0, 1)', "one of 'a', 'b'"; '' without a range."""
        found = re.match(r'((?:>=?|<=?) [\d.e-]+|in [\[(]\S+, \S+[\])]|one of [^:]+):', _comment(key))
        return found[1] if found else ''

    def _holds(rule, value):
        if rule.startswith('one of '):
            return value in ast.literal_eval(f'[{rule[7:]}]')
        if rule.startswith('in '):
            low, high = (float(text) for text in rule[4:-1].split(', '))
            closed = {low: rule[3] == '[', high: rule[-1] == ']'}
            return low <= value <= high and closed.get(value, True)
        return not rule or eval(f'value {rule}', {'value': value})

    def _set(key, value, where):
        """Sets a key: its type is the default's (int passes for float), ~ is the home folder."""
        if key not in config_keys:
            near = difflib.get_close_matches(key, config_keys, 1)
            hint = f', did you mean {near[0]!r}?' if near else '; --help lists the keys'
            _die(f'unknown config key {key!r} in {where}{hint}')
        default, rule = globals()[key], _range(key)
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            want = type(default).__name__
            got = type(value).__name__
            _die(f'{where}: {key} wants {want} (default {default!r}), got {got} {value!r}')
        if type(value) is str:  # a shell does not expand the ~ behind `=`
            home = r'(?:^|(?<=,)|(?<=\bchar:))~[\w.-]*(?=/|$)'
            value = re.sub(home, lambda found: _path.expanduser(found[0]), value)
        finite = type(value) is not float or math.isfinite(value)
        if not finite or not _holds(rule, value):
            _die(f'{where}: {key} is {value!r}, expected {rule or "a finite number"}')
        globals()[key] = value

    def _help():
        print((__doc__ or '').strip() + '\n\nconfig keys:')
        for key in config_keys:
            note = f'   # {_comment(key)}'.rstrip(' #')
            print(f'  --{key}={globals()[key]!r}{note}')
        sys.exit(0)

    def _run_file(name):
        """A config file. Any slip in it is one line with file, line number and reason."""
        beside = _path.join(_path.dirname(_path.abspath(__file__)), name)  # scripts run from any folder
        file = name if _path.exists(name) else beside
        if not _path.isfile(file) or not file.endswith('.py'):
            _die(f'no config file {name!r} (a .py with key = value); options are written --key=value')
        space = {key: globals()[key] for key in config_keys}
        try:
            tree = ast.parse(_read(file), file)
            for line in tree.body:  # YAML's `key: value`, a comparison: a line that would do nothing
                value = getattr(line, 'value', line)
                text = isinstance(value, (ast.Call, ast.Constant))  # a call may print, a text explains
                if value is None or (isinstance(line, ast.Expr) and not text):
                    raise SyntaxError('this line sets nothing', ('', line.lineno, 0, ''))
            code = builtins.compile(tree, file, 'exec')  # `compile` is a key of the stages
            exec(code, space)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [1] + [frame.lineno for frame in frames if frame.filename == file]
            line = getattr(error, 'lineno', None) or lines[-1]
            _die(f'{name}:{line}: {type(error).__name__}: {" ".join(str(error).split())}')
        for key, value in space.items():
            if not key.startswith('_') and not isinstance(value, types.ModuleType):
                _set(key, value, name)

    def _override(arg):
        """One argument of the command line: --key=value, a bare --flag, or a config file."""
        if not arg.startswith('--'):
            return _run_file(arg)
        key, equals, value = arg[2:].partition('=')
        kind = type(globals()[key]) if key in config_keys else str
        if not equals and kind is not bool and key in config_keys:
            _die(f'--{key} wants a value behind an equals sign: --{key}={globals()[key]!r}')
        if kind is not str:
            try:
                value = ast.literal_eval(value if equals else 'True')
            except Exception:
                value = str(value)  # a text where a number is wanted: _set says so
        _set(key, value, 'the command line')

    sys.excepthook = _excepthook
    _source = _read(_path.abspath(__file__))
    if '--help' in sys.argv[1:] or '-h' in sys.argv[1:]:
        _help()
    for _arg in sys.argv[1:]:
        _override(_arg)
