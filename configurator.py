# Poor man's configurator (nanoGPT's idea): exec'd at the top of every script, imported by nobody.
#
#     python ppo.py config/ppo_gpt2.py --batch_size=32 --compile     # file(s) first, then --key=value; later wins
#
# The caller has its config as plain globals and their names in `config_keys`. A config file runs in a namespace of its
# own, so it may compute, but it cannot clobber a function of the script; its helper names start with an underscore.
# A mistake of the user ends in one line on stderr and exit code 2: unknown key, wrong type, and every ValueError or
# OSError that our own files raise later on. An exception from anywhere else keeps its traceback: that is a bug.
# (comments, not a docstring: exec would put it in the place of the script's own __doc__, which --help prints)
if __name__ in ('__main__', '__mp_main__'):  # '__mp_main__': a spawned worker; under `import ppo` nothing happens
    import ast, builtins, difflib, re, sys, traceback, types
    from os import path as _path

    def _die(message):
        print(f'error: {message}', file=sys.stderr, flush=True)
        sys.exit(2)

    def _excepthook(kind, error, tb, _root=globals().get('_root') or _path.dirname(_path.abspath(__file__))):
        frames = traceback.extract_tb(tb)
        ours = frames and _path.dirname(_path.abspath(frames[-1].filename)).startswith(_root)
        if issubclass(kind, KeyboardInterrupt):
            again = '--init_from=resume goes on from the last checkpoint' if 'init_from' in config_keys else 'run it again'
            print(f'\ninterrupted; {again}', file=sys.stderr, flush=True)
            sys.exit(130)
        if (issubclass(kind, ValueError) and ours) or (issubclass(kind, OSError) and error.errno):
            _die(' '.join(str(error).split()))
        sys.__excepthook__(kind, error, tb)

    def _typed(key, value, where):
        """The value if its type is the default's; int passes for float. Anything else ends the run."""
        want = type(globals()[key])
        if want is float and type(value) is int:
            return float(value)
        if type(value) is not want:
            _die(f'{where}: {key} wants {want.__name__} (default {globals()[key]!r}), got {type(value).__name__} {value!r}')
        return value

    def _check(key, where):
        if key not in config_keys:
            near = difflib.get_close_matches(key, config_keys, 1)
            _die(f'unknown config key {key!r} in {where}' + (f', did you mean {near[0]!r}?' if near else '; --help lists the keys'))

    def _help(source):
        print((__doc__ or '').strip() + '\n\nconfig keys:')
        for key in config_keys:
            note = re.search(rf'^{key} = .*?#\s*(.*)$', source, re.M)
            print(f'  --{key}={globals()[key]!r}' + (f'   # {note[1]}' if note else ''))
        sys.exit(0)

    def _override(arg):
        if not arg.startswith('--'):
            beside = _path.join(_path.dirname(_path.abspath(__file__)), arg)  # scripts run from any folder
            file = arg if _path.exists(arg) else beside
            if not _path.isfile(file):
                _die(f'no config file {arg!r}; options are written --key=value')
            space = {'__file__': file}
            builtins.exec(compile_(open(file).read(), file, 'exec'), space)
            for key, value in space.items():
                if not key.startswith('_') and not isinstance(value, types.ModuleType):
                    _check(key, arg)
                    globals()[key] = _typed(key, value, arg)
            return
        key, eq, text = arg[2:].partition('=')
        _check(key, 'the command line')
        if type(globals()[key]) is str:
            if not eq:
                _die(f'--{key} wants a value: --{key}=...')
            globals()[key] = text
            return
        try:
            value = ast.literal_eval(text) if eq else True  # a bare --flag means True
        except (SyntaxError, ValueError):
            value = text
        globals()[key] = _typed(key, value, 'the command line')

    compile_ = builtins.compile  # `compile` itself is a config key of the stages
    sys.excepthook = _excepthook
    if '--help' in sys.argv[1:] or '-h' in sys.argv[1:]:
        _help(open(_path.abspath(__file__)).read())
    for _arg in sys.argv[1:]:
        _override(_arg)
