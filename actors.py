"""Tasks, actors and a shared object store: Ray's names and rules in one file, on processes of this machine, on a few machines, or on Ray.

    import actors
    actors.init(num_cpus=4)                     # init(backend='ray'): the same program, unchanged, on real Ray

    @actors.remote
    def square(x): return x * x
    print(actors.get([square.remote(i) for i in range(4)]))     # [0, 1, 4, 9]

    python actors.py --head=True --port=6399                    # a cluster: one head (prints a token) ...
    python actors.py --address=HOST:6399 --num_cpus=4           # ... nodes (ACTORS_TOKEN as printed), programs: init(address='HOST:6399')
    python actors.py status                                     # nodes, actors, queues, object store of what runs here

How it works, top to bottom
1. Values travel as pickle 5: arrays and tensors out of band, functions and classes of the running script by value (code + globals + closure).
2. A value above 100 KB is written once into the node's arena, one anonymous memory file that all its processes share, and is read in place: arrays
   through a read-only map, tensors copy-on-write. When the arena is full, new objects go to an unlinked file on disk. Neither file has a name:
   nothing can leak.
3. The hub keeps all state behind one lock: objects and who refers to them, tasks, actors, resources. In a local program it is a thread of the driver;
   for a cluster it is the head process. Whoever calls sends it (operation, request id, arguments); every answer carries the request id.
4. Workers are forked by the zygote, a small single-threaded process which has NumPy (and torch, if the driver has it) imported and nothing else:
   a start costs milliseconds and inherits no thread, lock or CUDA context. torch gets as many threads as the task has CPUs (NumPy's BLAS: one).
   When the driver dies, its sockets close, and workers and zygote end by that.
5. Over TCP both sides prove that they know the token (HMAC-SHA256 of fresh nonces) before anything is unpickled. After that the peer is trusted and the
   bytes are not encrypted: a cluster is for one private network, or for ssh tunnels.

Left out of Ray: generators, namespaces, runtime_env (but env_vars), autoscaling, lineage (a result that only a dead node held is ObjectLostError).
Between nodes data passes through the head. Whoever outgrows that has backend='ray'.
"""
import atexit, bisect, collections, contextvars, dataclasses, difflib, dis, enum, functools, hashlib, hmac, importlib, inspect, io, itertools, json, marshal, mmap
import os, pickle, queue, secrets, select, selectors, signal, socket, struct, subprocess, sys, tempfile, threading, time, traceback, types, weakref

import numpy as np

INLINE = 100 << 10       # bytes; above it a value goes through the arena (Ray's limit)
TWO_COPY = 8 << 20       # bytes; from here on two threads copy into the arena: memory takes 1.3 times what one core can send
MAX_MESSAGE = 1 << 30    # a pickled message; the raw tail behind it (an object on its way to another node) may be MAX_TAIL
MAX_TAIL = 1 << 38
BEAT, SILENCE = 1.0, 8.0  # seconds between a node's heartbeats; silence after which it is taken for dead
PRELOAD = ['torch']      # imported once by the zygote if the driver has it, not by every worker (seconds each)
HANDSHAKE = 10.0         # seconds that a peer has to prove itself
_session = None          # this process's connection to a hub; None before init, and under backend='ray'


# ---- errors: Ray's names -------------------------------------------------------------------------------------------------------------------
class RayError(Exception): 'Whatever goes wrong here.'
class RayTaskError(RayError):
    """A task or method raised. str() is the remote traceback, .cause the user's exception; get() raises it as an instance of the cause's class too."""
    def __init__(self, function_name, traceback_str, cause=None):
        super().__init__(function_name, traceback_str, cause)
        self.function_name, self.traceback_str, self.cause = function_name, traceback_str, cause
    def __str__(self):
        return self.traceback_str
    def as_instanceof_cause(self):
        kind = type(self.cause)
        if not issubclass(kind, Exception) or issubclass(RayTaskError, kind):
            return self
        space = {'__str__': RayTaskError.__str__, '__init__': lambda self: None, '__getattr__': lambda self, name: getattr(self.__dict__['cause'], name),
                 '__reduce__': lambda self: (RayTaskError, (self.function_name, self.traceback_str, self.cause)), '__module__': __name__}
        try:
            both = type(f'RayTaskError({kind.__name__})', (RayTaskError, kind), space)
            error = both.__new__(both)
        except TypeError:  # a class that cannot be mixed; the plain error still carries it as .cause
            return self
        error.__dict__.update(self.__dict__)
        error.args = self.cause.args
        return error
class TaskCancelledError(RayError): 'The task was cancelled.'
class WorkerCrashedError(RayError): 'The process that ran the task died, also in its retries.'
class RayActorError(RayError): 'Something about an actor.'
class ActorDiedError(RayActorError): 'The actor is dead and stays dead.'
class ActorUnavailableError(RayActorError): 'The actor died in this call and is being restarted; the call may or may not have run.'
class GetTimeoutError(RayError, TimeoutError): 'get() waited as long as it was told to.'
class ObjectLostError(RayError): 'No process that held the object lives.'
class ObjectStoreFullError(RayError): 'Neither the arena nor the disk has room.'
class RaySystemError(RayError): 'The runtime itself failed, or is gone.'
class AuthenticationError(RayError): 'The other side of a connection does not know the token.'
class TaskUnschedulableError(RayError): 'The node that the task insists on is gone.'
class ActorUnschedulableError(RayError): 'The node that the actor insists on is gone.'
class TaskPlacementGroupRemoved(RayError): 'The placement group of the task was removed.'
class ActorPlacementGroupRemoved(RayError): 'The placement group of the actor was removed.'
class ActorAlreadyExistsError(ValueError, RayError): 'The name is taken.'


# ---- values to bytes and back --------------------------------------------------------------------------------------------------------------
@functools.lru_cache(None)
def _findable(package):
    return any(finder.find_spec(package, None) for finder in sys.meta_path if hasattr(finder, 'find_spec'))


def _importable(obj):
    """Can another process reach this function or class as module.qualname? If not, it travels by value."""
    module = getattr(obj, '__module__', None)
    if module == 'builtins':
        return True
    if module in (None, '__main__', '__mp_main__') or '<' in obj.__qualname__ or not _findable(module.partition('.')[0]):
        return False
    found = sys.modules.get(module)
    for part in obj.__qualname__.split('.'):
        found = getattr(found, part, None)
    return found is obj


def _global_names(code):
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ('LOAD_GLOBAL', 'STORE_GLOBAL', 'LOAD_NAME')}
    return names.union(*[_global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)])


def _new_function(code, space, name, cells):
    space.setdefault('__builtins__', __builtins__)
    return types.FunctionType(marshal.loads(code), space, name, None, tuple(types.CellType() for _ in range(cells)) or None)


def _fill_function(f, state):
    space, modules, cells, attributes = state
    for module in modules:  # `import a.b` binds only a, yet the code says a.b
        importlib.import_module(module)
    f.__globals__.update(space)
    for cell, filled in zip(f.__closure__ or (), cells):
        if filled:
            cell.cell_contents = filled[0]
    for key, value in attributes.items():
        setattr(f, key, value)


# A class that travelled by value keeps one identity per process, so that `except MyError` in the script catches what a worker raised.
_class_ids, _classes = weakref.WeakKeyDictionary(), weakref.WeakValueDictionary()


def _new_class(key, meta, name, bases, first):
    if key not in _classes:
        made = types.new_class(name, bases, {'metaclass': meta}, lambda space: space.update(first))
        _classes[key], _class_ids[made] = made, [key, False]
    return _classes[key]


def _fill_class(cls, state):
    if not _class_ids[cls][1]:
        _class_ids[cls][1] = True
        for key, value in state.items():
            type.__setattr__(cls, key, value)


def _proxy(mapping):
    return types.MappingProxyType(mapping)


def _cached_property(func, name):
    made = functools.cached_property(func)
    made.__set_name__(None, name)
    return made


def _array(a):
    """Out of band whatever the layout, and read-only at the other end: there it may be memory that others see too."""
    if a.dtype.hasobject or not a.size:
        return NotImplemented
    a = (a if a.flags.forc else np.ascontiguousarray(a)).view()
    a.flags.writeable = False
    return a.__reduce_ex__(5)


def _tensor(buffer, dtype, shape, grad, kind):
    import torch
    t = torch.frombuffer(buffer, dtype=dtype).reshape(shape)
    return kind(t, requires_grad=grad) if kind is not torch.Tensor else t.requires_grad_(grad)


def _flat_tensor(t, torch):
    """CPU tensors out of band. They come back writable: a write lands in the reader's own copy-on-write page, never in the shared object."""
    if t.device.type != 'cpu' or t.layout != torch.strided or t.is_quantized or not t.numel() or type(t) not in (torch.Tensor, torch.nn.Parameter):
        return NotImplemented
    raw = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(raw), t.dtype, tuple(t.shape), t.requires_grad, type(t))


class _Pickler(pickle.Pickler):
    """Pickle 5 plus what the standard leaves out: functions and classes by value, arrays and tensors out of band, refs counted in .contained."""
    def __init__(self, file):
        self.buffers, self.contained, self.spaces = [], [], {}
        super().__init__(file, 5, buffer_callback=self.buffers.append)

    def reducer_override(self, obj):
        kind = type(obj)
        if kind is ObjectRef:
            self.contained.append(obj._id)
            return ObjectRef, (obj._id,)
        if kind is np.ndarray:
            return _array(obj)
        if kind is types.FunctionType:
            return NotImplemented if _importable(obj) else self.function(obj)
        if issubclass(kind, type):
            return NotImplemented if _importable(obj) else self.by_value(obj)
        if isinstance(obj, types.ModuleType):
            return importlib.import_module, (obj.__name__,)
        if kind is property:
            return property, (obj.fget, obj.fset, obj.fdel, obj.__doc__)
        if kind in (classmethod, staticmethod):
            return kind, (obj.__func__,)
        if kind is types.MappingProxyType:
            return _proxy, (dict(obj),)
        if kind is functools.cached_property:
            return _cached_property, (obj.func, obj.attrname)
        if kind is functools._lru_cache_wrapper and not _importable(obj):
            return functools.partial(functools.lru_cache, **obj.cache_parameters())(), (obj.__wrapped__,)
        if kind.__module__ == 'dataclasses':  # its markers are compared by identity
            for name, value in vars(dataclasses).items():
                if value is obj:
                    return getattr, (dataclasses, name)
        torch = sys.modules.get('torch')
        if torch and isinstance(obj, torch.Tensor):
            return _flat_tensor(obj, torch)
        return NotImplemented

    def function(self, f):
        space = f.__globals__
        used = {name: space[name] for name in _global_names(f.__code__) if name in space}
        prefixes = tuple(f'{v.__name__}.' for v in used.values() if isinstance(v, types.ModuleType))
        modules = [m for m in list(sys.modules) if m.startswith(prefixes) and set(m.split('.')[1:]) <= set(f.__code__.co_names)] if prefixes else []
        shared, _ = self.spaces.setdefault(id(space), ({'__name__': space.get('__name__')}, space))  # functions of one module share their globals there too
        cells = []
        for cell in f.__closure__ or ():
            try:
                cells.append((cell.cell_contents,))
            except ValueError:  # not bound yet
                cells.append(())
        attributes = {'__qualname__': f.__qualname__, '__doc__': f.__doc__, '__defaults__': f.__defaults__, '__kwdefaults__': f.__kwdefaults__, **f.__dict__}
        return _new_function, (marshal.dumps(f.__code__), shared, f.__name__, len(cells)), (used, modules, cells, attributes), None, None, _fill_function

    def by_value(self, cls):
        key = _class_ids.setdefault(cls, [secrets.token_bytes(12), True])[0]
        _classes[key] = cls
        skip = (types.MemberDescriptorType, types.GetSetDescriptorType)
        state = {k: v for k, v in vars(cls).items() if not isinstance(v, skip) and k != '_abc_impl'}
        first = {k: state.pop(k) for k in ('__module__', '__slots__') if k in state} | {'__qualname__': cls.__qualname__}
        if issubclass(cls, enum.Enum):  # the members must be there when the class is made
            first |= {m.name: m.value for m in cls}
            state = {k: v for k, v in state.items() if isinstance(v, (types.FunctionType, classmethod, staticmethod, property)) and k not in ('__new__', '_generate_next_value_')}
            key = key, type(cls), cls.__name__, cls.__bases__
            return _new_enum, (*key, first), state, None, None, _fill_class
        return _new_class, (key, type(cls), cls.__name__, cls.__bases__, first), state, None, None, _fill_class


def _new_enum(key, meta, name, bases, first):
    def body(space):
        for k, v in first.items():  # one by one: an enum's namespace takes notes on assignment, not on update
            space[k] = v
    if key not in _classes:
        made = types.new_class(name, bases, {'metaclass': meta}, body)
        _classes[key], _class_ids[made] = made, [key, False]
    return _classes[key]


_WRITABLE = 1 << 63  # in the count: there are tensors, whose reader may write to its copy


class _Packed:
    """A value as bytes: head (counts, table, pickle), then the out-of-band buffers, each on a 64-byte boundary. .size is the whole."""
    __slots__ = 'head', 'chunks', 'size', 'contained'
    def __init__(self, value):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        data, raws, table, self.chunks = file.getvalue(), [b.raw() for b in pickler.buffers], [], []
        at = 16 + 16 * len(raws) + len(data)
        for raw in raws:
            at = -(-at // 64) * 64
            table += at, raw.nbytes
            self.chunks.append((at, raw))
            at += raw.nbytes
        writable = any(not raw.readonly for raw in raws)
        self.head = struct.pack(f'<{2 + len(table)}Q', len(raws) | writable << 63, len(data), *table) + data
        self.size, self.contained = at, pickler.contained
    def write(self, put):
        put(0, self.head)
        for at, raw in self.chunks:
            put(at, raw)
    def join(self):
        if not self.chunks:
            return self.head
        blob = bytearray(self.size)
        self.write(lambda at, raw: blob.__setitem__(slice(at, at + len(raw)), raw))
        return bytes(blob)


def _unpack(blob):
    count, size = struct.unpack_from('<2Q', blob)
    count &= ~_WRITABLE
    if count and isinstance(blob, bytes):
        blob = bytearray(blob)  # a small tensor may be written to; an array is read-only by what its pickle says
    view = memoryview(blob)
    table = struct.unpack_from(f'<{2 * count}Q', view, 16)
    start = 16 + 16 * count
    return pickle.loads(view[start:start + size], buffers=[view[at:at + n] for at, n in zip(table[::2], table[1::2])])


def _pack_error(error):
    try:
        return _Packed(error).join()
    except Exception as e:  # the cause cannot be pickled: its traceback still can
        text = f'{error}\n(the exception itself could not be sent: {type(e).__name__}: {e})'
        return _Packed(RayTaskError(error.function_name, text) if isinstance(error, RayTaskError) else RaySystemError(text)).join()


# ---- the store: one arena in memory, one on disk --------------------------------------------------------------------------------------------
class _Free:
    """First fit over one file, in pages. Low addresses first: pages once touched are used again (33 GB/s against 1.5 GB/s into fresh ones)."""
    def __init__(self, capacity):
        self.capacity, self.used, self.holes = capacity, 0, [(0, capacity)]
    def take(self, size):
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        for i, (at, room) in enumerate(self.holes):
            if room >= size:
                self.holes[i:i + 1] = [(at + size, room - size)] if room > size else []
                self.used += size
                return at
        return None
    def give(self, at, size):
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.used -= size
        i = bisect.bisect(self.holes, (at,))
        if i < len(self.holes) and self.holes[i][0] == at + size:
            size += self.holes.pop(i)[1]
        if i and sum(self.holes[i - 1]) == at:
            at, size = self.holes[i - 1][0], self.holes.pop(i - 1)[1] + size
            i -= 1
        self.holes.insert(i, (at, size))


class _Private(mmap.mmap):
    """One object mapped copy-on-write. The tensors in it keep the map, the map keeps .ref, the ref keeps the object."""


class _Shared(np.ndarray):
    """One object in the process's read-only map of the whole arena, whose page tables are filled once and stay. Keeps .ref likewise."""


class _Store:
    """This process's hold on its node's two files: 0 memory, 1 disk. A location is (file, offset, size); who may write where is the hub's business."""
    def __init__(self, capacity, fds=None):
        self.capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fds, self.map, self.reading = fds, None, None
        if not fds:
            memory = os.memfd_create('actors-arena') if hasattr(os, 'memfd_create') else self._nameless()
            os.ftruncate(memory, self.capacity)
            self.fds = memory, self._nameless()
    def _nameless(self):
        with tempfile.TemporaryFile(prefix='actors-') as f:
            return os.dup(f.fileno())
    def write(self, loc, put):
        """put(write) is called with write(at, bytes)."""
        file, start, _ = loc
        if file:
            try:
                put(lambda at, raw: self._pwrite(start + at, memoryview(raw).cast('B')))
            except OSError as e:
                raise ObjectStoreFullError(f'arena full and no room on disk for {loc[2] >> 20} MB: {e}; init(object_store_memory=...) bigger, or free refs') from None
            return
        self.map = self.map or mmap.mmap(self.fds[0], self.capacity)
        put(lambda at, raw: self._copy(start + at, raw))
    def _copy(self, at, raw):
        n = memoryview(raw).nbytes
        if n < TWO_COPY:
            self.map[at:at + n] = raw
            return
        to, source, half = np.frombuffer(self.map, np.uint8, n, at), np.frombuffer(raw, np.uint8), n // 2 // mmap.PAGESIZE * mmap.PAGESIZE
        other = threading.Thread(target=np.copyto, args=(to[half:], source[half:]))  # outside of the interpreter's lock
        other.start()
        np.copyto(to[:half], source[:half])
        other.join()
    def _pwrite(self, at, raw):
        while raw:
            n = os.pwrite(self.fds[1], raw[:1 << 30], at)
            raw, at = raw[n:], at + n
    def view(self, loc, ref=None):
        file, start, size = loc
        if not file:
            self.reading = self.reading or mmap.mmap(self.fds[0], self.capacity, prot=mmap.PROT_READ)
            if not struct.unpack_from('<Q', self.reading, start)[0] & _WRITABLE:
                view = np.frombuffer(self.reading, np.uint8, size, start).view(_Shared)
                view.ref = ref
                return memoryview(view)
        view = _Private(self.fds[file], size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
        view.ref = ref
        return view
    def close(self):
        for fd in self.fds:
            os.close(fd)


# ---- frames and the handshake ----------------------------------------------------------------------------------------------------------------
_FRAME = struct.Struct('<2Q')  # bytes of the pickled message, bytes of the raw tail


def _frame(msg, tail=b''):
    data = pickle.dumps(msg, 5)
    return _FRAME.pack(len(data), len(tail)) + data


class _Feed:
    """Bytes in, whole (message, tail) pairs out."""
    def __init__(self):
        self.buffer = bytearray()
    def __call__(self, data):
        buf, at, out = self.buffer, 0, []
        buf += data
        while len(buf) - at >= 16:
            n, m = _FRAME.unpack_from(buf, at)
            if n > MAX_MESSAGE or m > MAX_TAIL:
                raise ConnectionError(f'frame of {n} + {m} bytes: more than {MAX_MESSAGE} + {MAX_TAIL}')
            if len(buf) - at < 16 + n + m:
                break
            with memoryview(buf) as view:
                out.append((pickle.loads(view[at + 16:at + 16 + n]), bytes(view[at + 16 + n:at + 16 + n + m])))
            at += 16 + n + m
        del buf[:at]
        return out


_HELLO = f'actors/1 py{sys.version_info[0]}.{sys.version_info[1]}'.encode().ljust(16)  # code travels as bytecode: one Python version in a cluster


def _proof(token, who, a, b):
    return hmac.digest(token.encode(), who + a + b, 'sha256')


def _read_exactly(sock, n):
    data = b''
    while len(data) < n:
        more = sock.recv(n - len(data))
        if not more:
            raise ConnectionError('connection closed in the handshake')
        data += more
    return data


def _admit(sock, token):
    """Server's half. Every read has a fixed length; nothing of the peer's is interpreted before its proof. True if it knows the token."""
    sock.settimeout(HANDSHAKE)
    theirs = _read_exactly(sock, 48)
    if theirs[:16] != _HELLO:
        sock.sendall(b'V' + _HELLO + bytes(16))
        return False
    mine, theirs = secrets.token_bytes(32), theirs[16:]
    sock.sendall(b'+' + mine)
    if not hmac.compare_digest(_read_exactly(sock, 32), _proof(token, b'client', theirs, mine)):
        sock.sendall(b'T' + bytes(32))
        return False
    sock.sendall(b'+' + _proof(token, b'server', theirs, mine))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return True


def _poll(*socks):
    """-> told(seconds=None): the set of their file numbers that can be read by then. select.select takes no number above 1,023, and
    multiprocessing.connection.wait registers anew in each call."""
    p = select.poll()
    for sock in socks:
        p.register(sock, select.POLLIN)
    return lambda seconds=None: {fd for fd, _ in p.poll(None if seconds is None else 1000 * seconds)}


def _connect(address, token):
    """Client's half -> a connected socket whose other end knows the token. ConnectionError, AuthenticationError."""
    host, _, port = address.rpartition(':')
    try:
        sock = socket.create_connection((host or '127.0.0.1', int(port)), timeout=HANDSHAKE)
    except ValueError:
        raise ValueError(f'address {address!r}: expected HOST:PORT') from None
    except OSError as e:
        raise ConnectionError(f'no head at {address} ({e}); start one: python actors.py --head=True --port={port}') from None
    mine = secrets.token_bytes(32)
    sock.sendall(_HELLO + mine)
    answer = _read_exactly(sock, 33)
    if answer[:1] != b'+':
        raise AuthenticationError(f'{address} runs {answer[1:17].decode(errors="replace").strip()!r}, this is {_HELLO.decode().strip()!r}: use one Python version everywhere')
    theirs = answer[1:]
    sock.sendall(_proof(token, b'client', mine, theirs))
    answer = _read_exactly(sock, 33)
    if answer[:1] != b'+' or not hmac.compare_digest(answer[1:], _proof(token, b'server', mine, theirs)):
        raise AuthenticationError(f'{address} refused the token: set ACTORS_TOKEN to what the head printed')
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _token_file(port):
    folder = os.path.join(os.path.expanduser('~'), '.cache', 'actors')
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return os.path.join(folder, f'token-{port}')


def _find_token(address):
    """ACTORS_TOKEN, else the file that a head on this machine wrote for its port."""
    file = _token_file(address.rpartition(':')[2])
    if not os.environ.get('ACTORS_TOKEN') and not os.path.exists(file):
        raise ValueError(f'no token for {address}: set ACTORS_TOKEN to what the head printed')
    return os.environ.get('ACTORS_TOKEN') or open(file).read().strip()


# ---- the hub's records -----------------------------------------------------------------------------------------------------------------------
class _Pool:
    """Resources of a node or of a placement group's bundle. GPUs are told apart: ids -> free share."""
    def __init__(self, total, gpus):
        self.total, self.free, self.gpus = dict(total), dict(total), dict(gpus)
    def copy(self):
        other = _Pool(self.total, self.gpus)
        other.free = dict(self.free)
        return other
    def fits(self, need):
        gpu = need.get('GPU', 0)
        return all(self.free.get(k, 0) >= v - 1e-6 for k, v in need.items()) and (
            not gpu or (sum(f >= 1 - 1e-6 for f in self.gpus.values()) >= gpu if gpu >= 1 else any(f >= gpu - 1e-6 for f in self.gpus.values())))
    def take(self, need):
        """-> the GPU ids given. A share of a GPU goes where it leaves the least over."""
        for k, v in need.items():
            self.free[k] = round(self.free[k] - v, 6)
        gpu = need.get('GPU', 0)
        ids = sorted((f, g) for g, f in self.gpus.items() if f >= min(gpu, 1) - 1e-6)[:int(max(gpu, 1))] if gpu else []
        for _, g in ids:
            self.gpus[g] = round(self.gpus[g] - min(gpu, 1), 6)
        return tuple(g for _, g in ids)
    def give(self, need, ids):
        for k, v in need.items():
            self.free[k] = round(self.free[k] + v, 6)
        for g in ids:
            self.gpus[g] = round(self.gpus[g] + min(need['GPU'], 1), 6)


class _Obj:
    __slots__ = 'refs', 'ready', 'err', 'blob', 'locs', 'contained', 'waiters', 'moving', 'actor'
    def __init__(self):
        self.refs, self.ready, self.err, self.blob, self.actor = 1, False, False, None, None
        self.locs, self.contained, self.waiters, self.moving = {}, (), {}, ()


class _Task:
    """What a client submitted (the first three lines, in this order) and where it stands."""
    __slots__ = ('id', 'kind', 'name', 'fn', 'method', 'blob', 'deps', 'contained', 'returns',
                 'need', 'strategy', 'env', 'retries', 'retry_exc', 'actor', 'extra',
                 'parent', 'job', 'peer', 'lease', 'queue', 'cancelled')
    def __init__(self, *spec):
        for key, value in zip(self.__slots__, spec):
            setattr(self, key, value)
        self.parent = self.job = self.peer = self.lease = self.queue = None
        self.cancelled = False


class _Actor:
    def __init__(self, id, create, restarts, task_retries, name, detached, meta):
        self.id, self.create, self.restarts, self.task_retries, self.name, self.detached, self.meta = id, create, restarts, task_retries, name, detached, meta
        self.state, self.peer, self.queue, self.inflight, self.error, self.restarted, self.waiting = 'pending', None, collections.deque(), {}, None, 0, False


class _Group:
    def __init__(self, id, bundles, strategy, name, job):
        self.id, self.bundles, self.strategy, self.name, self.job = id, bundles, strategy, name, job
        self.places, self.ready = [None] * len(bundles), []  # (node, pool, gpus) of each bundle; refs that wait for it


class _Node:
    def __init__(self, id, peer, resources, gpus, capacity, host):
        self.id, self.peer, self.host, self.alive, self.pool = id, peer, host, True, _Pool(resources, gpus)
        self.arenas, self.idle, self.workers = (_Free(capacity), _Free(1 << 50)), {}, {}


class _Wait:
    """Calls fn once when all but `spare` of the objects are ready (and on `node`, if one is named)."""
    __slots__ = 'left', 'spare', 'node', 'fn'
    def __init__(self, left, spare, node, fn):
        self.left, self.spare, self.node, self.fn = left, spare, node, fn


class _Peer:
    """The hub's view of another process: a worker, a program that runs here or elsewhere, a node's daemon."""
    def __init__(self, hub, role, id, node=None, sock=None):
        self.hub, self.role, self.id, self.node, self.sock = hub, role, id, node, sock
        self.feed, self.out, self.refs, self.allocs, self.known, self.waits = _Feed(), collections.deque(), collections.Counter(), set(), set(), {}
        self.job = self.task = self.actor = self.key = self.reason = self.nursery = self.owes = None
        self.dead, self.stuck, self.blocked, self.last, self.tail, self.pid = False, False, 0, time.monotonic(), b'', 0
    def send(self, msg, tail=b''):
        self.out.append(_frame(msg, tail))
        if len(tail):
            self.out.append(tail)
        if self.sock and not self.stuck:
            self.flush()
    def flush(self):
        while self.out:
            try:
                n = self.sock.sendmsg(list(itertools.islice(self.out, 64)))
            except BlockingIOError:
                break
            except OSError:  # it is gone: reading will say so
                self.out.clear()
                break
            while self.out and n >= len(self.out[0]):
                n -= len(self.out.popleft())
            if n:
                self.out[0] = memoryview(self.out[0])[n:]
        if self.stuck != bool(self.out):
            self.stuck = bool(self.out)
            self.hub.sel.modify(self.sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if self.stuck else 0), self)


class _Inner(_Peer):
    """The driver that the hub is a thread of: an answer is a function call."""
    def send(self, msg, tail=b''):
        self.deliver(msg, tail)


# ---- the hub ---------------------------------------------------------------------------------------------------------------------------------
class _Hub:
    """All state, one lock. on_<operation>(peer, request, ...) runs under it, for the driver in its own thread, for the others in the hub's."""
    def __init__(self, resources, gpus, capacity, listen=None, token=None):
        self.lock, self.sel = threading.RLock(), selectors.DefaultSelector()
        self.objects, self.tasks, self.actors, self.names, self.groups, self.functions = {}, {}, {}, {}, {}, {}
        self.nodes, self.peers, self.queues, self.asks, self.warned = {}, {}, {}, {}, set()
        self.dirty, self.later, self.closed, self.inner, self.asked = False, collections.deque(), False, None, itertools.count(1)
        self.token, self.store, self.address = token, _Store(capacity), None
        self.nursery = _Nursery(self.store)
        self.home = self.nodes.setdefault(id := secrets.token_hex(16), _Node(id, None, resources, gpus, self.store.capacity, '127.0.0.1'))
        wake, self.waker = socket.socketpair()
        self.sel.register(wake, selectors.EVENT_READ, lambda: wake.recv(4096))
        self.listeners = []
        if listen:
            self.tcp = socket.create_server(listen)
            self.listeners.append((self.tcp, lambda sock: _admit(sock, token)))
            self.address = '%s:%d' % self.tcp.getsockname()[:2]
        elif sys.platform == 'linux':  # for `actors.py status`: an abstract name (nothing on disk), this user's processes only
            local = socket.socket(socket.AF_UNIX)
            local.bind(f'\0actors-{os.getuid()}-{os.getpid()}-{secrets.token_hex(4)}')
            local.listen()
            self.listeners.append((local, self.tell_status))
        for sock, admit in self.listeners:
            self.sel.register(sock, selectors.EVENT_READ, functools.partial(self.accept, sock, admit))
        self.thread = threading.Thread(target=self.run, name='actors-hub', daemon=True)
        self.thread.start()

    # -- the loop
    def run(self):
        beat = time.monotonic()
        try:
            while not self.closed:
                events = self.sel.select(BEAT / 2)
                with self.lock:
                    for key, mask in events:
                        if callable(key.data):
                            key.data()
                            continue
                        if mask & selectors.EVENT_WRITE:
                            key.data.stuck and key.data.flush()
                        if mask & selectors.EVENT_READ:
                            self.readable(key.data)
                    self.settle()
                    if time.monotonic() - beat > BEAT:
                        beat = time.monotonic()
                        self.heartbeat()
        except Exception as e:  # a bug of ours must not look like a slow task
            if not self.closed:
                traceback.print_exc()
                self.closed = True
                if self.inner:
                    self.inner.broken(RaySystemError(f'the hub failed: {type(e).__name__}: {e}'))

    def heartbeat(self):
        for node in list(self.nodes.values()):
            if node.peer:
                node.peer.send(('beat',))
                if time.monotonic() - node.peer.last > SILENCE:
                    self.lost(node.peer, f'no sign of life for {SILENCE:.0f} s')
        self.settle()

    def accept(self, listener, admit):
        """Handshakes happen in threads with a deadline: a silent stranger stops nobody. At most 64 at once."""
        sock, _ = listener.accept()
        if sum(t.name == 'actors-handshake' for t in threading.enumerate()) >= 64:
            sock.close()
            return
        def greet():
            try:
                ok = admit(sock)
            except OSError:
                ok = False
            if not ok:
                sock.close()
                return
            sock.setblocking(False)
            with self.lock:
                if not self.closed:
                    self.sel.register(sock, selectors.EVENT_READ, _Peer(self, 'stranger', secrets.token_bytes(8), sock=sock))
        threading.Thread(target=greet, name='actors-handshake', daemon=True).start()

    def tell_status(self, sock):
        _, uid, _ = struct.unpack('3i', sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid == os.getuid():
            with self.lock:
                text = json.dumps(self.status())
            sock.sendall(text.encode())
        return False

    def readable(self, peer, why='the connection closed'):
        while not peer.dead:
            try:
                data = peer.sock.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError:
                data = b''
            peer.last = time.monotonic()
            try:
                for msg, tail in peer.feed(data):
                    self.handle(peer, msg, tail)
            except Exception as e:  # oversized or garbled: this peer's connection ends, nothing else does
                print(f'actors: dropped {peer.role} {peer.id.hex()}: {type(e).__name__}: {e}', file=sys.stderr)
                data = b''
            if not data:
                self.lost(peer, why)
            elif len(data) < 1 << 18:
                return

    def handle(self, peer, msg, tail=b''):
        op, request, *args = msg
        peer.tail = tail
        if peer.role == 'stranger' and op != 'hello':
            raise ConnectionError(f'{op} before hello')
        try:
            getattr(self, 'on_' + op)(peer, request, *args)
        except (RayError, ValueError, KeyError) as e:
            if not request:
                raise
            peer.send(('reply', request, e))
        if peer.role == 'inner':
            self.settle()

    def settle(self):
        """What the last messages made possible. Here, not where it became possible: a chain of ten thousand tasks must not be as many stack frames."""
        while self.dirty or self.later:
            if self.later:
                self.later.popleft()()
                continue
            self.dirty = False
            self.place_groups()
            self.schedule()

    # -- objects
    def ref(self, oid, d):
        obj = self.objects.get(oid)
        if obj:
            obj.refs += d
            if obj.refs <= 0 and obj.ready:
                self.free(oid)

    def free(self, oid):
        dying = [oid]
        while dying:
            obj = self.objects[oid := dying.pop()]
            if obj.actor and obj.actor.state != 'dead':
                self.out_of_scope(obj.actor)
                continue
            if obj.actor:
                del self.actors[oid]
            del self.objects[oid]
            for node_id, (file, at, size) in obj.locs.items():
                if node_id in self.nodes:
                    self.nodes[node_id].arenas[file].give(at, size)
            for inner in obj.contained:
                other = self.objects.get(inner)
                if other:
                    other.refs -= 1
                    if other.refs <= 0 and other.ready:
                        dying.append(inner)

    def fulfil(self, oid, blob=None, node=None, loc=None, contained=(), err=False):
        obj = self.objects.get(oid)
        if obj is None or obj.ready:
            return
        obj.ready, obj.err, obj.blob, obj.contained = True, err, blob, contained
        if loc:
            obj.locs = {node.id: loc}
        for inner in contained:
            self.ref(inner, 1)
        self.poke(oid, obj)
        self.ref(oid, 0)

    def poke(self, oid, obj):
        for w in list(obj.waiters):
            if w in obj.waiters and self.here(oid, w.node):
                w.left.discard(oid)
                obj.waiters.pop(w, None)
                if len(w.left) <= w.spare:
                    self.unwatch(w)
                    self.later.append(w.fn)

    def here(self, oid, node):
        """Ready, and readable by the processes of `node`; if it is elsewhere, its journey begins."""
        obj = self.objects.get(oid)
        if obj is None:
            raise ObjectLostError(f'object {oid.hex()} is not known here: freed, or of an earlier session')
        if not obj.ready or node is None or obj.blob is not None or node.id in obj.locs or not node.alive:
            return obj.ready
        if node.id not in obj.moving:
            self.move(oid, obj, node)
        return node.id in obj.locs

    def watch(self, oids, spare, node, fn):
        """None if it is so already, else the _Wait that will call fn."""
        left = {oid for oid in oids if not self.here(oid, node)}
        if len(left) <= spare:
            return None
        w = _Wait(left, spare, node, fn)
        for oid in left:
            self.objects[oid].waiters[w] = None
        return w

    def unwatch(self, w):
        for oid in w.left:
            if oid in self.objects:
                self.objects[oid].waiters.pop(w, None)

    def alloc(self, node, size):
        if self.inner:
            self.inner.drain()  # refs that the driver dropped a moment ago may be all the room there is
        at = node.arenas[0].take(size)
        return (0, at, size) if at is not None else (1, node.arenas[1].take(size), size)

    def move(self, oid, obj, node):
        """A copy on another node, through the head: read there, write here. Pinned meanwhile; if a node dies on the way, whoever waits asks anew."""
        source, loc = next(iter(obj.locs.items()))
        room = self.alloc(node, loc[2])
        obj.moving, obj.refs = (*obj.moving, node.id), obj.refs + 1
        def end(arrived):
            obj.moving = tuple(n for n in obj.moving if n != node.id)
            if arrived:
                obj.locs[node.id] = room
            elif node.id in self.nodes:
                node.arenas[room[0]].give(*room[1:])
            self.poke(oid, obj)
            self.ref(oid, -1)
        def got(data):
            if node is self.home:
                self.store.write(room, lambda put: put(0, data))
                end(True)
            else:
                self.ask(node, 'write', room, data, lambda _: end(True), lambda: end(False))
        if source == self.home.id:
            got(memoryview(self.store.view(loc)))
        else:
            self.ask(self.nodes[source], 'read', loc, b'', got, lambda: end(False))

    def ask(self, node, op, loc, tail, then, otherwise):
        key = next(self.asked)
        self.asks[key] = node.id, then, otherwise
        node.peer.send((op, key, loc), tail)

    def on_answer(self, peer, _, key):
        _, then, _ = self.asks.pop(key)
        then(peer.tail)

    def value(self, oid, peer):
        """(id, is it an error, blob, location): one of the last two is None."""
        obj = self.objects[oid]
        if obj.blob is not None or peer.node:
            return oid, obj.err, obj.blob, None if obj.blob is not None else obj.locs[peer.node.id]
        return oid, obj.err, bytes(self.store.view(obj.locs[self.home.id])), None  # a program elsewhere shares no memory with any node

    def hold(self, peer, oid, d=1):
        if peer.role != 'inner':
            peer.refs[oid] += d

    def on_refs(self, peer, _, events):
        for oid, d in events:
            self.hold(peer, oid, d)
            self.ref(oid, d)

    def on_alloc(self, peer, request, size):
        loc = self.alloc(peer.node, size)
        peer.allocs.add((peer.node, loc))
        peer.send(('reply', request, loc))

    def on_put(self, peer, _, oid, loc, contained):
        self.objects[oid] = _Obj()
        self.hold(peer, oid)
        self.store_value(peer, oid, loc, contained, peer.tail)

    def store_value(self, peer, oid, loc, contained, blob):
        node = peer.node
        if loc:
            peer.allocs.discard((node, loc))
            blob = None
        elif len(blob) > INLINE and not node:
            node, loc, raw, blob = self.home, self.alloc(self.home, len(blob)), blob, None
            self.store.write(loc, lambda put: put(0, raw))
        if loc and (oid not in self.objects or self.objects[oid].ready):  # a late result that nobody waits for
            node.arenas[loc[0]].give(*loc[1:])
        self.fulfil(oid, blob, node, loc, contained)

    def answer_when(self, peer, request, oids, spare, node, answer):
        def fn():
            if peer.waits.pop(request, None):
                self.block(peer, -1)
            peer.send(('reply', request, answer()))
        w = self.watch(oids, spare, node, fn)
        if w is None:
            peer.send(('reply', request, answer()))
        else:
            peer.waits[request] = w
            self.block(peer, 1)

    def on_get(self, peer, request, oids):
        self.answer_when(peer, request, oids, 0, peer.node or self.home, lambda: [self.value(oid, peer) for oid in oids])

    def on_wait(self, peer, request, oids, count):
        self.answer_when(peer, request, oids, len(oids) - count, None, lambda: [self.objects[oid].ready for oid in oids])

    def on_drop(self, peer, _, request):
        w = peer.waits.pop(request, None)
        if w:
            self.unwatch(w)
            self.block(peer, -1)

    def block(self, peer, d):
        """A worker that waits lends its CPUs, or nested tasks would wait for each other for ever. Taken back even if that overdraws."""
        lease = peer.task.lease if peer.task else peer.actor.create.lease if peer.actor else None
        before, peer.blocked = peer.blocked, peer.blocked + d
        if lease and bool(before) != bool(peer.blocked) and 'CPU' in lease[1].free:
            lease[1].free['CPU'] += d * lease[3].get('CPU', 0)
            self.dirty = True

    # -- tasks
    def on_export(self, peer, _, fid, contained):
        if fid not in self.functions:
            self.functions[fid] = peer.tail
            for oid in contained:
                self.ref(oid, 1)

    def on_submit(self, peer, _, spec):
        t = _Task(*spec)
        t.job, t.parent = peer.job, peer.task and peer.task.id
        for oid in (*t.deps, *t.contained):
            self.ref(oid, 1)
        for oid in t.returns:
            self.objects[oid] = _Obj()
            self.hold(peer, oid)
        self.tasks[t.id] = t
        if t.kind == 'call':
            actor = self.actors.get(t.actor)
            if actor is None or actor.state == 'dead':
                self.fail(t, actor.error if actor else _pack_error(ActorDiedError('the actor is not known here: of an earlier session?')))
                return
            t.retries = actor.task_retries
            actor.queue.append(t)
            self.pump(actor)
        else:
            self.enqueue(t)

    def enqueue(self, t):
        """Into the queue of its like once its arguments exist. One queue per (needs, place): the first that does not fit stops only its own kind."""
        if t.id not in self.tasks:
            return
        if self.watch(t.deps, 0, None, lambda: self.enqueue(t)):
            return
        for oid in t.deps:
            if self.objects[oid].err:
                self.argument_failed(t, self.objects[oid].blob)
                return
        key = tuple(t.need.items()), t.strategy
        if key not in self.queues:
            self.queues[key] = collections.deque()
            self.warn(key, t)
        t.queue = self.queues[key]
        t.queue.append(t)
        self.dirty = True

    def schedule(self):
        for key in list(self.queues):
            queue = self.queues[key]
            while queue:
                spot = self.spot(queue[0])
                if spot is None:
                    break
                t = queue.popleft()
                t.queue = None
                if isinstance(spot, RayError):
                    self.fail(t, _pack_error(spot))
                else:
                    self.start(t, *spot)
            if not queue:
                del self.queues[key]

    def warn(self, key, t):
        if t.strategy[0] != 'group' and key not in self.warned and not any(_Pool(n.pool.total, dict.fromkeys(n.pool.gpus, 1)).fits(t.need) for n in self.nodes.values()):
            self.warned.add(key)
            print(f'actors: {t.name} asks for {t.need}; no node has that much (all together: {self.resources("total")}). It waits for a node to join.', file=sys.stderr)

    def spot(self, t):
        """(node, pool) with room for the task, None if it has to wait, or the error that it can never be."""
        kind, *where = t.strategy
        if kind == 'group':
            group = self.groups.get(where[0])
            if not group:
                return (ActorPlacementGroupRemoved if t.kind == 'create' else TaskPlacementGroupRemoved)(f'{t.name}: its placement group was removed')
            places = group.places if where[1] < 0 else group.places[where[1]:where[1] + 1]
            return next(((p[0], p[1]) for p in places if p and p[1].fits(t.need)), None)
        nodes = list(self.nodes.values())
        if kind == 'node':
            mine = self.nodes.get(where[0])
            if mine and mine.pool.fits(t.need):
                return mine, mine.pool
            if not where[1]:
                return None if mine else (ActorUnschedulableError if t.kind == 'create' else TaskUnschedulableError)(f'{t.name}: node {where[0]} is gone and soft=False')
        if kind == 'SPREAD':
            nodes.sort(key=lambda n: len(n.workers) - sum(map(len, n.idle.values())))
        return next(((n, n.pool) for n in nodes if n.pool.fits(t.need)), None)

    def start(self, t, node, pool):
        gpus = pool.take(t.need)
        t.lease = node, pool, gpus, t.need
        key = t.env, gpus
        peer = node.idle[key].pop() if node.idle.get(key) else self.spawn(node, key)
        t.peer, peer.task, peer.job = peer, t, t.job
        if t.kind == 'create':
            actor = self.actors[t.actor]
            actor.peer, peer.actor = peer, actor
        if self.watch(t.deps, 0, node, lambda: self.run_on(t, peer)) is None:
            self.run_on(t, peer)

    def spawn(self, node, key):
        env, gpus = dict(key[0]), key[1]
        if gpus:
            env['CUDA_VISIBLE_DEVICES'] = ','.join(gpus)
        peer = _Peer(self, 'worker', secrets.token_bytes(8), node)
        peer.key = key
        self.peers[peer.id] = node.workers[peer.id] = peer
        if node is self.home:
            peer.sock, theirs = socket.socketpair()
            peer.sock.setblocking(False)
            self.sel.register(peer.sock, selectors.EVENT_READ, peer)
            if self.nursery.closed:
                self.nursery = _Nursery(self.store)
            if self.nursery.sock not in self.sel.get_map():
                nursery = self.nursery
                self.sel.register(nursery.sock, selectors.EVENT_READ, lambda: self.nursery_says(nursery))
            peer.nursery = self.nursery
            self.nursery.spawn(peer.id, node.id, env, theirs)
            theirs.close()
        else:
            node.peer.send(('spawn', peer.id, env))
        return peer

    def nursery_says(self, nursery):
        exits = nursery.read()
        if exits is None:
            self.sel.unregister(nursery.sock)
            nursery.close()
            if not nursery.born:
                print('actors: the worker zygote died at its start (its words are above)', file=sys.stderr)
            exits = [(wid, 'the zygote died') for wid, worker in self.home.workers.items() if worker.nursery is nursery]
        for wid, why in exits:
            self.ended(wid, why)

    def ended(self, wid, why):
        worker = self.peers.get(wid)
        if worker:
            if worker.sock:
                self.readable(worker, why)  # what it said before it died counts
            self.lost(worker, why)

    def run_on(self, t, peer):
        if peer.dead or t.peer is not peer or t.id not in self.tasks:
            return
        values = [self.value(oid, peer) for oid in t.deps]
        wrong = [v for v in values if v[1]]
        if wrong:
            self.argument_failed(t, wrong[0][2])
            if t.kind == 'task':
                self.release(peer)
            elif t.kind == 'create':
                peer.send(('exit',))
            return
        code = None if t.fn in peer.known else self.functions.get(t.fn)
        peer.known.add(t.fn)
        peer.send(('run', t.id, t.kind, t.name, t.fn, code, t.method, t.blob, values, t.returns, t.retry_exc, t.need, t.extra and {**t.extra, 'restarted': self.actors[t.actor].restarted > 0}))

    def pump(self, actor):
        """Calls leave in the order they came; the first whose arguments are not there yet holds up the rest."""
        while actor.queue and actor.state == 'alive' and not actor.waiting:
            t = actor.queue[0]
            if t.deps:
                def again():
                    actor.waiting = False
                    self.pump(actor)
                if self.watch(t.deps, 0, actor.peer.node, again):
                    actor.waiting = True
                    return
            actor.queue.popleft()
            t.peer = actor.peer
            actor.inflight[t.id] = t
            self.run_on(t, actor.peer)

    def on_done(self, peer, _, tid, results):
        t = self.tasks.get(tid)
        blobs, at = peer.tail, 0
        if t is None or t.peer is not peer:
            for loc, _, _ in results:
                if loc:
                    peer.allocs.discard((peer.node, loc))
                    peer.node.arenas[loc[0]].give(*loc[1:])
            return
        for oid, (loc, contained, size) in zip(t.returns, results):
            self.store_value(peer, oid, loc, contained, blobs[at:at + size])
            at += size
        self.finish(t)
        if t.kind == 'create':
            actor = peer.actor
            peer.task, actor.state = None, 'alive'
            self.pump(actor)
            self.out_of_scope(actor)
        elif t.kind == 'task':
            self.release(peer)
        else:
            self.out_of_scope(peer.actor)

    def on_fail(self, peer, _, tid, retry):
        t = self.tasks.get(tid)
        if t is None or t.peer is not peer:
            return
        if t.kind == 'create':
            self.bury(peer.actor, peer.tail)
            peer.send(('exit',))
        elif retry and t.retries and not t.cancelled:
            t.retries, t.peer = t.retries - 1, None
            self.release(peer)
            self.enqueue(t)
        else:
            self.fail(t, peer.tail)
            if t.kind == 'task':
                self.release(peer)

    def argument_failed(self, t, blob):
        if t.kind == 'create':
            self.bury(self.actors[t.actor], 'an argument of its constructor could not be computed')
        else:
            self.fail(t, blob)

    def fail(self, t, blob):
        if t.kind == 'create' and self.actors[t.actor].state != 'dead':
            self.bury(self.actors[t.actor], blob)
        for oid in t.returns:
            self.fulfil(oid, blob, err=True)
        self.finish(t)

    def finish(self, t):
        """The task is over: what it held goes. An actor's creation keeps its arguments as long as it may have to be repeated."""
        actor = self.actors.get(t.actor)
        if actor and t.kind == 'call':
            actor.inflight.pop(t.id, None)
        if t.kind == 'create' and actor and actor.state != 'dead':
            return
        if self.tasks.pop(t.id, None):
            for oid in (*t.deps, *t.contained):
                self.ref(oid, -1)

    def give_back(self, t, peer):
        node, pool, gpus, need = t.lease
        t.lease = None
        if peer.blocked:
            need = {**need, 'CPU': 0} if 'CPU' in need else need
        pool.give(need, gpus)
        self.dirty = True

    def release(self, peer):
        """A task's worker is free: for the next task of its kind, or, if more wait idle than there are CPUs, to go home. One that had a GPU goes
        in any case, and only then is the GPU free: a process that lives may hold its memory."""
        t, peer.task = peer.task, None
        if t.lease[2]:
            peer.owes = t
            peer.send(('exit',))
            return
        self.give_back(t, peer)
        if sum(map(len, peer.node.idle.values())) > max(2, peer.node.pool.total.get('CPU', 0)):
            peer.reason = 'not needed'
            peer.send(('exit',))
        else:
            peer.node.idle.setdefault(peer.key, []).append(peer)

    # -- ends
    def lost(self, peer, why='the connection closed'):
        """A process is gone. Everything it held, ran or was goes by Ray's rules."""
        if peer.dead:
            return
        peer.dead = True
        if peer.sock:
            self.sel.unregister(peer.sock)
            peer.sock.close()
        self.peers.pop(peer.id, None)
        for w in peer.waits.values():
            self.unwatch(w)
        for node, (file, at, size) in peer.allocs:
            node.arenas[file].give(at, size)
        for oid, n in peer.refs.items():
            self.ref(oid, -n)
        if peer.role == 'worker':
            peer.node.workers.pop(peer.id, None)
            if peer in peer.node.idle.get(peer.key, ()):
                peer.node.idle[peer.key].remove(peer)
            if peer.node.peer and peer.node.alive:
                peer.node.peer.send(('kill', peer.id))
            if peer.owes:
                self.give_back(peer.owes, peer)
            if peer.actor:
                self.actor_down(peer.actor, peer, why)
            elif peer.task:
                self.task_down(peer.task, peer, why)
        elif peer.role == 'driver':
            self.job_over(peer.id)
        elif peer.role == 'node':
            self.node_lost(peer.node, why)
        self.dirty = True

    def task_down(self, t, peer, why):
        self.give_back(t, peer)
        if t.cancelled:
            self.fail(t, _pack_error(TaskCancelledError(f'{t.name} was cancelled')))
        elif peer.reason:
            self.fail(t, _pack_error(TaskPlacementGroupRemoved(f'{t.name}: {peer.reason}')))
        elif t.retries:
            t.retries, t.peer = t.retries - 1, None
            self.enqueue(t)
        else:
            self.fail(t, _pack_error(WorkerCrashedError(f'the worker of {t.name} died ({why}) and no retry is left; max_retries allows more')))

    def actor_down(self, actor, peer, why):
        if actor.create.lease:
            self.give_back(actor.create, peer)
        peer.actor = peer.task = None
        if actor.peer is not peer:
            return
        actor.peer, calls = None, list(actor.inflight.values())
        if actor.state == 'dead':
            return
        if peer.reason or not actor.restarts:
            self.bury(actor, peer.reason or why)
            return
        actor.restarts, actor.restarted, actor.state, actor.inflight = actor.restarts - 1, actor.restarted + 1, 'restarting', {}
        self.enqueue(actor.create)
        for t in reversed(calls):
            if t.retries and not t.cancelled:
                t.retries, t.peer = t.retries - 1, None
                actor.queue.appendleft(t)
            else:
                self.fail(t, _pack_error(ActorUnavailableError(f'{t.name}: the actor died in this call ({why}) and is restarting; the call may or may not have run')))

    def bury(self, actor, why):
        error = why if isinstance(why, bytes) else _pack_error(ActorDiedError(f"{actor.create.name.removesuffix('.__init__')}: the actor is dead: {why}"))
        actor.state, actor.error = 'dead', error
        if self.names.get(actor.name) is actor:
            del self.names[actor.name]
        for t in [*actor.inflight.values(), *actor.queue]:
            self.fail(t, error)
        actor.queue.clear()
        if actor.create.queue:
            actor.create.queue.remove(actor.create)
        self.finish(actor.create)
        self.ref(actor.id, 0)

    def out_of_scope(self, actor):
        """No handle is left anywhere, and nothing is to be done: the actor goes. A detached one stays."""
        if actor.state != 'alive' or self.objects[actor.id].refs > 0 or actor.detached or actor.queue or actor.inflight:
            return
        actor.peer.reason = 'its last handle went out of scope'
        self.bury(actor, actor.peer.reason)
        actor.peer.send(('exit',))

    def slay(self, peer, reason):
        peer.reason = reason
        if peer.node is self.home:
            self.nursery.kill(peer.id)
        elif peer.node.peer:
            peer.node.peer.send(('kill', peer.id))
        self.lost(peer, 'killed')

    def on_leave(self, peer, _):
        peer.reason = 'it called exit_actor()'

    def on_kill(self, peer, request, aid, no_restart):
        actor = self.actors[aid]  # there: its handle is what kill() was given
        if no_restart:
            actor.restarts = 0
        if actor.peer:
            self.slay(actor.peer, 'it was killed by actors.kill' if no_restart else None)
        elif actor.state != 'dead' and no_restart:
            self.bury(actor, 'it was killed by actors.kill')
        peer.send(('reply', request, None))

    def on_cancel(self, peer, request, tid, force, recursive):
        t = self.tasks.get(tid)
        if t and t.kind == 'call' and force:
            raise ValueError('force=True is not supported for actor tasks: use actors.kill')
        for child in [c.id for c in self.tasks.values() if c.parent == tid] if t and recursive else ():
            self.on_cancel(peer, None, child, force and self.tasks[child].kind == 'task', True)
        if t:
            t.cancelled = True
            actor = self.actors.get(t.actor)
            if t.peer is None:
                if t.queue:
                    t.queue.remove(t)
                elif actor and t in actor.queue:
                    actor.queue.remove(t)
                self.fail(t, _pack_error(TaskCancelledError(f'{t.name} was cancelled before it ran')))
            elif force:
                self.slay(t.peer, None)
            else:
                t.peer.send(('cancel', tid))
        if request:
            peer.send(('reply', request, None))

    def job_over(self, job):
        for t in [t for t in self.tasks.values() if t.job == job]:
            if t.kind == 'task' and t.peer and t.peer.task is t:
                t.retries = 0
                self.slay(t.peer, None)
            elif t.kind == 'task':
                self.on_cancel(t.peer, None, t.id, False, False)
        for actor in [a for a in self.actors.values() if a.create.job == job and not a.detached and a.state != 'dead']:
            actor.restarts = 0
            if actor.peer:
                self.slay(actor.peer, 'its program ended')
            else:
                self.bury(actor, 'its program ended')
        for group in [g for g in self.groups.values() if g.job == job]:
            self.remove_group(group.id)

    # -- actors
    def on_create(self, peer, request, spec, restarts, task_retries, name, get_if_exists, detached, meta):
        if name and name in self.names:
            if get_if_exists:
                return self.on_get_actor(peer, request, name)
            raise ActorAlreadyExistsError(f'the name {name!r} is taken: use get_actor({name!r}), or get_if_exists=True')
        t = _Task(*spec)
        t.job = peer.job
        for oid in (*t.deps, *t.contained):
            self.ref(oid, 1)
        actor = self.actors[t.actor] = _Actor(t.actor, t, restarts, task_retries, name, detached, meta)
        obj = self.objects[t.actor] = _Obj()
        obj.ready, obj.actor, obj.blob = True, actor, _Packed(None).join()
        self.hold(peer, t.actor)
        if name:
            self.names[name] = actor
        self.tasks[t.id] = t
        self.enqueue(t)
        peer.send(('reply', request, (t.actor, meta)))

    def on_get_actor(self, peer, request, name):
        actor = self.names.get(name)
        if not actor:
            raise ValueError(f'Failed to look up actor with name {name!r}: never created, or dead')
        self.ref(actor.id, 1)
        self.hold(peer, actor.id)
        peer.send(('reply', request, (actor.id, actor.meta)))

    # -- placement groups
    def on_group(self, peer, request, gid, bundles, strategy, name):
        self.groups[gid] = _Group(gid, bundles, strategy, name, peer.job)
        self.dirty = True
        peer.send(('reply', request, None))

    def on_group_ready(self, peer, _, gid, oid):
        self.objects[oid] = _Obj()
        self.hold(peer, oid)
        group = self.groups.get(gid)
        if not group:
            self.fulfil(oid, _pack_error(TaskPlacementGroupRemoved('the placement group was removed')), err=True)
        elif all(group.places):
            self.fulfil(oid, peer.tail)
        else:
            group.ready.append((oid, peer.tail))

    def place_groups(self):
        """All missing bundles of a group or none: tried on copies of the pools, then taken. Big bundles first, each on the fullest node that
        fits (PACK prefers nodes already in use, SPREAD unused ones): greedy, so a STRICT_SPREAD over very unequal nodes may wait without need."""
        for group in self.groups.values():
            missing = [i for i, p in enumerate(group.places) if not p]
            if not missing:
                continue
            plan = self.plan(group, missing)
            if plan is None:
                continue
            for i, node in plan:
                gpus = node.pool.take(group.bundles[i])
                group.places[i] = node, _Pool(group.bundles[i], {g: min(group.bundles[i]['GPU'], 1) for g in gpus}), gpus
            for oid, blob in group.ready:
                self.fulfil(oid, blob)
            group.ready, self.dirty = [], True

    def plan(self, group, missing):
        used = {p[0].id for p in group.places if p}
        order = sorted(missing, key=lambda i: -sum(group.bundles[i].values()))
        if group.strategy in ('PACK', 'STRICT_PACK'):
            for node in self.nodes.values():
                trial = node.pool.copy()
                if all(trial.fits(group.bundles[i]) and trial.take(group.bundles[i]) is not None for i in order):
                    return [(i, node) for i in order]
            if group.strategy == 'STRICT_PACK':
                return None
        trials, plan = {n.id: n.pool.copy() for n in self.nodes.values()}, []
        for i in order:
            fit = [n for n in self.nodes.values() if trials[n.id].fits(group.bundles[i]) and not (group.strategy == 'STRICT_SPREAD' and n.id in used)]
            if not fit:
                return None
            node = min(fit, key=lambda n: ((n.id in used) == (group.strategy != 'PACK'), sum(trials[n.id].free.values())))
            trials[node.id].take(group.bundles[i])
            used.add(node.id)
            plan.append((i, node))
        return plan

    def on_remove_group(self, peer, request, gid):
        self.remove_group(gid)
        peer.send(('reply', request, None))

    def remove_group(self, gid):
        group = self.groups.pop(gid, None)
        if not group:
            return
        for node, pool, gpus in filter(None, group.places):
            for worker in list(node.workers.values()):
                lease = worker.task.lease if worker.task else worker.actor.create.lease if worker.actor else None
                if lease and lease[1] is pool:
                    if worker.actor:
                        worker.actor.restarts = 0
                    self.slay(worker, 'its placement group was removed')
            node.pool.give(pool.total, gpus)
        for oid, _ in group.ready:
            self.fulfil(oid, _pack_error(TaskPlacementGroupRemoved('the placement group was removed')), err=True)
        self.dirty = True

    # -- nodes
    def on_hello(self, peer, request, role, info):
        if role == 'worker':  # its record was made when it was ordered; it gets its socket now
            worker = self.peers.get(info['id'])
            if not worker:
                raise ConnectionError('a worker that nobody waits for')
            worker.sock, peer.dead = peer.sock, True
            self.sel.modify(worker.sock, selectors.EVENT_READ, worker)
            worker.flush()
            return
        peer.role, peer.job = role, peer.id
        if role == 'node':
            peer.node = self.nodes[info['id']] = _Node(info['id'], peer, info['resources'], dict.fromkeys(info['gpus'], 1), info['capacity'], info['host'])
            self.dirty = True
        self.peers[peer.id] = peer
        peer.send(('reply', request, self.home.id))

    def on_beat(self, peer, _):
        peer.last = time.monotonic()

    def on_exited(self, peer, _, wid, why):
        self.ended(wid, why)

    def node_lost(self, node, why):
        print(f'actors: node {node.id[:8]} ({node.host}) is lost: {why}', file=sys.stderr)
        node.alive = False
        del self.nodes[node.id]
        for group in self.groups.values():
            group.places = [p if p and p[0] is not node else None for p in group.places]
        for peer in list(node.workers.values()):
            self.lost(peer, 'its node was lost')
        for oid, obj in list(self.objects.items()):
            if obj.locs.pop(node.id, None) and not obj.locs:
                obj.err, obj.blob = True, _pack_error(ObjectLostError(f'object {oid.hex()} was only on node {node.id[:8]}, which is lost'))
                self.poke(oid, obj)
        for key, (nid, _, otherwise) in list(self.asks.items()):
            if nid == node.id and self.asks.pop(key, None):
                otherwise()

    def resources(self, which):
        total = collections.Counter()
        for node in self.nodes.values():
            total.update(node.pool.total if which == 'total' else node.pool.free)
            total['object_store_memory'] += node.arenas[0].capacity - (node.arenas[0].used if which == 'free' else 0)
        return {k: float(round(v, 4)) for k, v in total.items() if v > 0}

    def status(self):
        queued = collections.Counter(t.name for t in self.tasks.values() if t.kind == 'task' and t.peer is None)
        running = collections.Counter(t.name for t in self.tasks.values() if t.kind == 'task' and t.peer)
        return {'pid': os.getpid(), 'address': self.address,
                'nodes': [{'id': n.id, 'host': n.host, 'total': n.pool.total, 'free': n.pool.free, 'workers': len(n.workers), 'idle': sum(map(len, n.idle.values())),
                           'store': n.arenas[0].capacity, 'used': n.arenas[0].used, 'spilled': n.arenas[1].used} for n in self.nodes.values()],
                'actors': [{'id': a.id.hex(), 'class': a.create.name.removesuffix('.__init__'), 'name': a.name or '', 'state': a.state, 'pid': a.peer.pid if a.peer else 0,
                            'node': a.peer.node.id if a.peer else '', 'queued': len(a.queue), 'running': len(a.inflight), 'restarts': a.restarted} for a in self.actors.values()],
                'queued': queued, 'running': running, 'objects': len(self.objects), 'groups': len(self.groups)}

    def on_info(self, peer, request, what):
        answer = self.status() if what == 'status' else self.resources(what) if what in ('total', 'free') else [
            {'NodeID': n.id, 'Alive': n.alive, 'NodeManagerAddress': n.host, 'NodeManagerHostname': n.host, 'Resources': dict(n.pool.total)} for n in self.nodes.values()]
        peer.send(('reply', request, answer))

    def on_pid(self, peer, _, pid):
        peer.pid = pid

    def close(self):
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.waker.send(b'x')
        if threading.current_thread() is not self.thread:
            self.thread.join(5)
        self.nursery.close()  # its workers die with it
        for key in list(self.sel.get_map().values()):
            key.fileobj.close()
        self.sel.close()
        self.waker.close()
        self.store.close()


# ---- the client's side: every driver and every worker has one ---------------------------------------------------------------------------------
class _Future:
    __slots__ = 'lock', 'value'
    def __init__(self):
        self.lock = threading.Lock()
        self.lock.acquire()
    def set(self, value):
        self.value = value
        self.lock.release()


class _Session:
    """Numbers requests, waits for answers, packs and unpacks values, reports which refs came and went. Subclasses know how to reach the hub."""
    def __init__(self, node, store):
        self.node, self.store = node, store
        self.prefix, self.count, self.requests = secrets.token_bytes(8), itertools.count(1), itertools.count(1)
        self.events, self.futures, self.exported, self.error, self.is_worker = collections.deque(), {}, {}, None, False

    def new_id(self):
        return self.prefix + next(self.count).to_bytes(6, 'big')

    def call(self, op, *args, timeout=None, tail=b''):
        request, future = next(self.requests), _Future()
        self.futures[request] = future
        self.post((op, request, *args), tail)
        if self.error:
            raise self.error
        if not future.lock.acquire(timeout=-1 if timeout is None else timeout):
            self.futures.pop(request, None)
            self.post(('drop', 0, request))
            raise GetTimeoutError(f'{op}: not there after {timeout} s')
        if isinstance(future.value, BaseException):
            raise future.value
        return future.value

    def answered(self, request, value):
        future = self.futures.pop(request, None)
        if future:  # else it waited no longer
            future.set(value)

    def broken(self, error):
        self.error = error
        for request in list(self.futures):
            self.answered(request, error)

    def pending_events(self):
        """Refs that came (+1) and went (-1) in this process since last told. __del__ only appends here: it may run anywhere, under any lock."""
        events, n = self.events, len(self.events)
        return [events.popleft() for _ in range(n)]

    def keep(self, packed, oid):
        """Write a large value where all of this node can read it -> location; a small one, or one of a program without a node, stays bytes."""
        if packed.size <= INLINE or not self.store:
            return None
        loc = self.call('alloc', packed.size)
        self.store.write(loc, packed.write)
        return loc

    def put(self, value=None, packed=None):
        packed = packed or _Packed(value)
        oid = self.new_id() + b'\xff\xff'
        loc = self.keep(packed, oid)
        self.post(('put', 0, oid, loc, packed.contained), b'' if loc else packed.join())
        return ObjectRef(oid, True)

    def load(self, value):
        oid, err, blob, loc = value
        return _unpack(blob if loc is None else self.store.view(loc, ObjectRef(oid)))

    def get(self, refs, timeout):
        values = self.call('get', [r._id for r in refs], timeout=timeout)
        out = []
        for value in values:
            out.append(self.load(value))
            if value[1]:
                raise out[-1].as_instanceof_cause() if isinstance(out[-1], RayTaskError) else out[-1]
        return out

    def wait(self, refs, count, timeout):
        oids = [r._id for r in refs]
        try:
            ready = self.call('wait', oids, count, timeout=timeout)
        except GetTimeoutError:
            ready = self.call('wait', oids, 0)
        done = [r for r, ok in zip(refs, ready) if ok][:count]
        chosen = set(done)
        return done, [r for r in refs if r not in chosen]

    def export(self, obj):
        """The id under which workers find a function or class; sent once per session."""
        try:
            return self.exported[obj]
        except KeyError:
            packed = _Packed(obj)
        blob = packed.join()
        fid = self.exported[obj] = hashlib.sha256(blob).digest()[:16]
        self.post(('export', 0, fid, packed.contained), blob)
        return fid

    def arguments(self, name, args, kwargs):
        """(blob, deps, contained, a ref to keep): refs at the top level are dependencies, replaced by _Arg; others travel as refs. Large ones are put first."""
        deps = []
        if any(type(v) is ObjectRef for v in args) or any(type(v) is ObjectRef for v in kwargs.values()):
            def swap(v):
                if type(v) is not ObjectRef:
                    return v
                deps.append(v._id)
                return _Arg(len(deps) - 1)
            args, kwargs = tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}
        elif not args and not kwargs:
            return _NO_ARGS, (), (), None
        try:
            packed = _Packed((args, kwargs))
        except (TypeError, AttributeError, pickle.PicklingError) as e:
            raise TypeError(f'could not serialize the arguments of {name}: {e}') from e
        if packed.size <= INLINE:
            return packed.join(), deps, packed.contained, None
        ref = self.put(packed=packed)
        return None, [ref._id, *deps], (), ref  # ref must live until the submit is out; from there the hub counts

    def submit(self, kind, name, fid, method, args, kwargs, plan, actor=None, extra=None, create=()):
        blob, deps, contained, kept = self.arguments(name, args, kwargs)
        tid = self.new_id()
        returns = [tid + i.to_bytes(2, 'big') for i in range(plan.num_returns)] if kind != 'create' else []
        spec = tid, kind, name, fid, method, blob, deps, contained, returns, plan.need, plan.strategy, plan.env, plan.retries, plan.retry_exc, actor, extra
        if kind == 'create':
            return self.call('create', spec, *create)
        self.post(('submit', 0, spec))
        del kept
        refs = [ObjectRef(oid, True) for oid in returns]
        return refs[0] if len(refs) == 1 else refs or None


class _Direct(_Session):
    """A session whose hub is a thread of this process: a message is a function call under the hub's lock."""
    def __init__(self, hub):
        super().__init__(hub.home.id, hub.store)
        self.hub = hub
        self.peer = hub.inner = _Inner(hub, 'inner', secrets.token_bytes(8), hub.home)
        self.peer.job = self.peer.id
        self.peer.deliver = lambda msg, tail: self.answered(msg[1], msg[2])
        self.peer.drain, self.peer.broken = self.drain, self.broken
    def drain(self):
        if self.events:
            self.hub.on_refs(self.peer, 0, self.pending_events())
    def post(self, msg, tail=b''):
        with self.hub.lock:
            self.drain()
            self.hub.handle(self.peer, msg, tail)
    def close(self):
        self.hub.close()
        self.broken(RaySystemError('actors.shutdown() was called'))


class _Remote(_Session):
    """A session over a socket: a worker's, or that of a program which joined a cluster."""
    def __init__(self, sock, node, store):
        super().__init__(node, store)
        self.sock, self.sending, self.feed = sock, threading.Lock(), _Feed()
    def post(self, msg, tail=b''):
        frame = _frame(msg, tail)
        with self.sending:
            if self.events:
                frame = _frame(('refs', 0, self.pending_events())) + frame
            try:
                self.sock.sendall(frame)
                if len(tail):
                    self.sock.sendall(tail)
            except OSError as e:
                self.broken(RaySystemError(f'the head is gone: {e}'))
    def read(self):
        """Whole messages until the connection ends. Woken once a second, to report refs that went while nothing else was said."""
        told = _poll(self.sock)
        while True:
            if not told(1.0):
                if self.events:
                    self.post(('beat', 0))
                continue
            try:
                data = self.sock.recv(1 << 18)
            except OSError:
                data = b''
            if not data:
                return
            for msg, tail in self.feed(data):
                if msg[0] == 'reply':
                    self.answered(msg[1], msg[2])
                else:
                    yield msg, tail
    def listen(self):
        for _ in self.read():
            continue
        self.sock.close()
        self.broken(RaySystemError('the head is gone: the connection closed'))
    def close(self):
        try:
            self.sock.shutdown(socket.SHUT_RDWR)  # the reading thread sees the end and closes
        except OSError:
            self.sock.close()
        self.broken(RaySystemError('actors.shutdown() was called'))


class _Arg:
    """Stands in the arguments for the i-th dependency."""
    __slots__ = 'i',
    def __init__(self, i):
        self.i = i
    def __reduce__(self):
        return _Arg, (self.i,)


_NO_ARGS = _Packed(((), {})).join()


# ---- workers -----------------------------------------------------------------------------------------------------------------------------------
_current = contextvars.ContextVar('actors_current', default={})  # what get_runtime_context tells: the task that this thread or coroutine runs


class _Exit(SystemExit):
    """exit_actor()"""


class _Worker:
    """One process that runs tasks one after the other, or is one actor. The reading thread only sorts; the main thread runs user code."""
    def __init__(self, session):
        self.session, self.jobs, self.functions, self.dropped = session, queue.SimpleQueue(), {}, set()
        self.running = self.actor = self.actor_info = self.pool = self.loop = None
        signal.signal(signal.SIGINT, self.interrupted)
        threading.Thread(target=self.sort, name='actors-reader', daemon=True).start()

    def sort(self):
        for msg, _ in self.session.read():
            if msg[0] == 'cancel':
                self.dropped.add(msg[1])
                if self.running == msg[1]:
                    os.kill(os.getpid(), signal.SIGINT)  # interrupts a sleep or a read too
            else:
                self.jobs.put(msg)
        os._exit(1)  # the hub is gone: nobody wants what is running here

    def interrupted(self, *_):
        if self.running in self.dropped:
            self.running = None
            raise TaskCancelledError('cancelled while it ran')

    def serve(self):
        self.session.post(('pid', 0, os.getpid()))
        while (msg := self.jobs.get())[0] == 'run':
            self.take(msg)
            del msg
        if self.pool:
            self.pool.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()

    def take(self, msg):
        _, tid, kind, name, fid, code, method, blob, values, returns, retry_exc, need, extra = msg
        if code is not None:
            self.functions[fid] = _unpack(code)
        if kind == 'create':
            self.actor_info = extra
        info = {'task': tid, 'name': name, 'need': need, 'actor': self.actor_info}
        job = tid, kind, name, fid, method, blob, values, returns, retry_exc, info
        if kind != 'call' or not (self.pool or self.loop):
            self.run(*job)
            if kind == 'create' and self.actor is not None:
                self.widen(extra['max_concurrency'])
        elif self.loop:
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self.run_async(*job)))
        else:
            self.pool.submit(self.run, *job)

    def widen(self, width):
        """An actor with coroutine methods gets an event loop, one with max_concurrency > 1 threads."""
        if any(inspect.iscoroutinefunction(m) for _, m in inspect.getmembers(type(self.actor), inspect.isfunction)):
            import asyncio
            self.loop = asyncio.new_event_loop()
            self.gate = asyncio.Semaphore(width or 1000)
            threading.Thread(target=self.loop.run_forever, name='actors-loop', daemon=True).start()
        elif (width or 1) > 1:
            import concurrent.futures
            self.pool = concurrent.futures.ThreadPoolExecutor(width, 'actors-call')

    def prepare(self, tid, kind, fid, method, blob, values):
        if tid in self.dropped:
            raise TaskCancelledError('cancelled before it ran')
        loaded = [self.session.load(v) for v in values]
        args, kwargs = loaded.pop(0) if blob is None else ((), {}) if blob == _NO_ARGS else _unpack(blob)
        if loaded:
            args = [loaded[a.i] if type(a) is _Arg else a for a in args]
            kwargs = {k: loaded[a.i] if type(a) is _Arg else a for k, a in kwargs.items()}
        return self.functions[fid] if kind != 'call' else getattr(self.actor, method), args, kwargs

    def run(self, tid, kind, name, fid, method, blob, values, returns, retry_exc, info):
        _current.set(info)
        try:
            f, args, kwargs = self.prepare(tid, kind, fid, method, blob, values)
            values = None
            if kind == 'task':
                self.running = tid
            result = f(*args, **kwargs)
            self.running = None
            if inspect.iscoroutine(result):
                import asyncio
                result = asyncio.run(result)
            del args, kwargs
            self.done(tid, kind, result, returns)
        except BaseException as e:
            self.running = None
            self.failed(tid, kind, name, e, retry_exc)
        self.dropped.discard(tid)

    async def run_async(self, tid, kind, name, fid, method, blob, values, returns, retry_exc, info):
        async with self.gate:
            _current.set(info)
            try:
                f, args, kwargs = self.prepare(tid, kind, fid, method, blob, values)
                result = f(*args, **kwargs)
                self.done(tid, kind, await result if inspect.iscoroutine(result) else result, returns)
            except BaseException as e:
                self.failed(tid, kind, name, e, retry_exc)

    def done(self, tid, kind, result, returns):
        if kind == 'create':
            self.actor, result = result, None
        if len(returns) != 1:
            result = list(result) if returns else []
            if len(result) != len(returns):
                raise ValueError(f'Task returned {len(result)} objects, but num_returns={len(returns)}.')
        else:
            result = [result]
        packed = [_Packed(v) for v in result]
        locs = [self.session.keep(p, None) for p in packed]
        blobs = [b'' if loc else p.join() for p, loc in zip(packed, locs)]
        self.session.post(('done', 0, tid, [(loc, p.contained, len(b)) for p, loc, b in zip(packed, locs, blobs)]), b''.join(blobs))

    def failed(self, tid, kind, name, e, retry_exc):
        if isinstance(e, _Exit):
            self.session.post(('leave', 0))
            sys.stdout.flush()
            os._exit(0)
        retry = retry_exc is True or bool(retry_exc) and isinstance(e, _unpack(retry_exc))
        if isinstance(e, TaskCancelledError) and tid in self.dropped:
            error = TaskCancelledError(f'{name} was {e}')
        else:
            tb = e.__traceback__
            while tb and tb.tb_frame.f_code.co_filename == __file__:  # the story begins in the user's code
                tb = tb.tb_next
            cause = e.cause if isinstance(e, RayTaskError) else e
            text = ''.join(traceback.format_exception(type(e), e, tb)).rstrip()
            error = RayTaskError(name, f'{name}() (pid={os.getpid()}, node={self.session.node[:8]})\n{text}', cause)
            if kind == 'create':
                error = ActorDiedError(f'The actor died because of an error raised in its creation task, {error}')
        self.session.post(('fail', 0, tid, retry), _pack_error(error))


class _Nursery:
    """The zygote's parent: orders workers from it, hears of their ends. Used by the hub for its own node and by the daemon of any other."""
    def __init__(self, store):
        self.sock, theirs = socket.socketpair()
        self.feed, self.born, self.closed = _Feed(), 0, False
        code = f'import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); import actors; actors._zygote({theirs.fileno()}, {store.capacity}, {store.fds})'
        # one thread per library until a worker asks for more: a process that forks must have no threads
        self.proc = subprocess.Popen([sys.executable, '-c', code], pass_fds=(theirs.fileno(), *store.fds), start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        theirs.close()
    def spawn(self, wid, node, env, sock=None, address=None, token=None):
        order = 'spawn', wid, node, env, sys.path, os.getcwd(), [m for m in PRELOAD if m in sys.modules], address, token
        try:
            if sock:
                socket.send_fds(self.sock, [b'f'], [sock.fileno()])
            else:
                self.sock.sendall(b'-')
            self.sock.sendall(_frame(order))
        except OSError:
            return  # it died: read() will say so
    def kill(self, wid):
        try:
            self.sock.sendall(b'-' + _frame(('kill', wid)))
        except OSError:
            return
    def read(self):
        """[(worker, how it ended)], None when the zygote itself is gone."""
        try:
            data = self.sock.recv(1 << 16)
        except OSError:
            data = b''
        self.born += bool(data)
        return [msg for msg, _ in self.feed(data)] if data else None
    def close(self):
        self.closed = True
        self.sock.close()  # it kills its children and goes
        try:
            self.proc.wait(5)
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.wait()


def _zygote(fd, capacity, fds):
    """Forks workers on order. Single-threaded for life: only that makes fork safe. Orders: one byte ('f': a socket comes along), then a frame."""
    import gc
    sock, children, (heard, wake) = socket.socket(fileno=fd), {}, os.pipe()
    for end in heard, wake:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    told = _poll(sock, heard)
    while True:
        ready = told()
        if heard in ready:
            os.read(heard, 4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                code = os.waitstatus_to_exitcode(status)
                _zygote_send(sock, (children.pop(pid), f'exit code {code}' if code >= 0 else f'killed by {signal.Signals(-code).name}'))
        if sock.fileno() not in ready:
            continue
        try:
            flag, passed, _, _ = socket.recv_fds(sock, 1, 1)
        except OSError:
            flag = b''
        if not flag:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            for pid in children:  # whoever waits for this process may rely on it: none is left
                os.waitpid(pid, 0)
            os._exit(0)
        head = _read_exactly(sock, 16)
        order = pickle.loads(_read_exactly(sock, _FRAME.unpack(head)[0]))
        if order[0] == 'kill':
            for pid in [p for p, wid in children.items() if wid == order[1]]:
                os.kill(pid, signal.SIGKILL)
            continue
        for module in order[6]:
            importlib.import_module(module)
        pid = os.fork()
        if not pid:
            try:
                sock.close()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(heard)
                os.close(wake)
                _worker(passed[0] if passed else None, _Store(capacity, fds), *order[1:])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        children[pid] = order[1]
        for passed_fd in passed:
            os.close(passed_fd)


def _zygote_send(sock, msg):
    try:
        sock.sendall(_frame(msg))
    except OSError:
        return  # the parent is gone: the next read ends this process


def _worker(fd, store, wid, node, env, path, cwd, _, address, token):
    global _session
    os.environ.update(env)
    sys.path[:] = path
    sys.stdout.reconfigure(line_buffering=True)
    np.random.seed()  # the fork copied the zygote's generator
    if 'torch' in sys.modules:
        sys.modules['torch'].set_num_threads(int(env.get('OMP_NUM_THREADS', 1)))
    if address:
        sock = _connect(address, token)
        sock.sendall(_frame(('hello', 0, 'worker', {'id': wid})))
    else:
        sock = socket.socket(fileno=fd)
    _session = _Remote(sock, node, store)
    _session.is_worker = True
    _Worker(_session).serve()


# ---- the interface: Ray's ----------------------------------------------------------------------------------------------------------------------
def _ray():
    """The ray module if this process speaks through Ray: after init(backend='ray'), and in Ray's own workers."""
    ray = sys.modules.get('ray')
    return ray if _session is None and ray is not None and hasattr(ray, 'is_initialized') and ray.is_initialized() else None


def _here():
    if _session is None:
        init()
    return _session


def _or_ray(f):
    """Under backend='ray' the function of the same name is Ray's."""
    @functools.wraps(f)
    def call(*args, **kwargs):
        ray = _ray()
        return getattr(ray, f.__name__)(*args, **kwargs) if ray else f(*args, **kwargs)
    return call


def _count_gpus():
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [g for g in visible.split(',') if g.strip() not in ('', '-1')]
    folder = '/proc/driver/nvidia/gpus'
    return [str(i) for i in range(len(os.listdir(folder)))] if os.path.isdir(folder) else []


def _machine(num_cpus, num_gpus, resources, object_store_memory):
    """-> ({resource: amount}, GPU ids, arena bytes). The arena is 30 % of memory, as in Ray; untouched pages cost nothing."""
    gpus = _count_gpus()
    if num_gpus is not None:
        gpus = (gpus + [str(i) for i in range(len(gpus), int(num_gpus))])[:int(num_gpus)]
    cpus = num_cpus if num_cpus is not None else len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    total = {'CPU': cpus, 'GPU': len(gpus), **(resources or {})}
    memory = object_store_memory or int(0.3 * os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
    return {k: v for k, v in total.items() if v}, dict.fromkeys(gpus, 1), int(memory)


def init(num_cpus=None, num_gpus=None, resources=None, object_store_memory=None, address=None, backend='local', ignore_reinit_error=False, **ray_options):
    """Start here (backend='local'), join a cluster (address='HOST:PORT', token from ACTORS_TOKEN), or do everything on Ray (backend='ray').
    num_cpus counts processes that run at once, object_store_memory bytes. ray_options go to ray.init. RuntimeError if already initialised."""
    global _session
    if is_initialized():
        if ignore_reinit_error:
            return
        raise RuntimeError('actors.init() was called already: shutdown() first, or ignore_reinit_error=True')
    if backend == 'ray':
        try:
            import ray
        except ImportError:
            raise ValueError("backend='ray' needs Ray: pip install ray") from None
        options = dict(num_cpus=num_cpus, num_gpus=num_gpus, resources=resources, object_store_memory=object_store_memory, address=address)
        return ray.init(**{k: v for k, v in options.items() if v is not None}, **ray_options)
    if backend != 'local':
        raise ValueError(f"backend {backend!r}: expected 'local' or 'ray'")
    if ray_options:
        raise ValueError(f"{', '.join(ray_options)}: only backend='ray' knows that")
    if address:
        if num_cpus or num_gpus or resources or object_store_memory:
            raise ValueError('num_cpus, num_gpus, resources, object_store_memory belong to the nodes of a cluster, not to a program that joins one')
        session = _Remote(_connect(address, _find_token(address)), '', None)
        threading.Thread(target=session.listen, name='actors-reader', daemon=True).start()
        session.node = session.call('hello', 'driver', {}, timeout=HANDSHAKE)
        _session = session
    else:
        total, gpus, memory = _machine(num_cpus, num_gpus, resources, object_store_memory)
        _session = _Direct(_Hub(total, gpus, memory))
    atexit.register(shutdown)


def shutdown():
    """Ends the session and every process of it. Refs and handles of it are dead."""
    global _session
    if _session is not None and not _session.is_worker:  # a worker's session is its process
        session, _session = _session, None
        atexit.unregister(shutdown)
        session.close()
    elif _ray():
        _ray().shutdown()


def is_initialized():
    return _session is not None or _ray() is not None


class _RefKind(type):
    def __instancecheck__(cls, obj):
        return type(obj) is cls or 'ray' in sys.modules and isinstance(obj, getattr(sys.modules['ray'], 'ObjectRef', ()))


class ObjectRef(metaclass=_RefKind):
    """A promise of a value, counted wherever it goes: when the last one is gone, so is the value."""
    __slots__ = '_id', '_session', '__weakref__'
    def __init__(self, id, counted=False):
        if _session is None:
            raise RaySystemError('a ref was received, but actors is not initialised here')
        self._id, self._session = id, _session
        if not counted:
            _session.events.append((id, 1))
    def __del__(self):
        self._session.events.append((self._id, -1))
    def __eq__(self, other):
        return type(other) is ObjectRef and other._id == self._id
    def __hash__(self):
        return hash(self._id)
    def __repr__(self):
        return f'ObjectRef({self._id.hex()})'
    def hex(self):
        return self._id.hex()
    def binary(self):
        return self._id
    def __reduce__(self):
        raise TypeError('an ObjectRef travels as an argument, as a result or inside put(), where it is counted; plain pickle would lose count')
    def __await__(self):
        import asyncio
        return asyncio.get_running_loop().run_in_executor(None, get, self).__await__()


@_or_ray
def get(refs, *, timeout=None):
    """The value of a ref, or the list for a list. Raises what the task raised. Arrays are read-only views of shared memory. GetTimeoutError."""
    single = type(refs) is ObjectRef
    if not single and not isinstance(refs, list):
        raise ValueError(f'Invalid type of object refs, {type(refs)}, is given: an ObjectRef or a list of them')
    session = _here()
    for ref in [refs] if single else refs:
        if type(ref) is not ObjectRef:
            raise TypeError(f'Attempting to call `get` on the value {ref!r}, which is not an ObjectRef')
        if ref._session is not session:
            raise ValueError(f'{ref!r} is of an earlier session')
    values = session.get([refs] if single else refs, timeout)
    return values[0] if single else values


@_or_ray
def put(value):
    """A ref to a copy of value in the object store; 100 MB once, however many actors read it."""
    if type(value) is ObjectRef:
        raise TypeError("Calling 'put' on an ObjectRef is not allowed; put it in a list if you mean that")
    return _here().put(value)


@_or_ray
def wait(refs, *, num_returns=1, timeout=None, fetch_local=True):
    """(ready, rest), at most num_returns ready ones, in the order given. Returns when so many are ready, or at the timeout (seconds)."""
    if not isinstance(refs, list):
        raise TypeError(f'wait() expected a list of ObjectRef, got {refs!r}')
    if len(set(refs)) != len(refs):
        raise ValueError('wait() needs a list of unique refs')
    if timeout is not None and timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    if not refs:
        return [], []
    if not 0 < num_returns <= len(refs):
        raise ValueError(f'num_returns {num_returns}: expected 1 to {len(refs)}, the number of refs')
    return _here().wait(refs, num_returns, timeout)


@_or_ray
def kill(actor, *, no_restart=True):
    """SIGKILL to the actor's process. no_restart=False: as if it had crashed."""
    if not isinstance(actor, ActorHandle):
        raise ValueError(f'kill() is for actors, got {type(actor).__name__}; for tasks there is cancel()')
    _here().call('kill', actor._ref._id, no_restart)


@_or_ray
def cancel(ref, *, force=False, recursive=True):
    """A task that waits is dropped, one that runs is interrupted (force=True: its process is killed); get() then raises TaskCancelledError."""
    if type(ref) is not ObjectRef:
        raise TypeError(f'cancel() expected an ObjectRef, got {type(ref).__name__}')
    _here().call('cancel', ref._id[:14], force, recursive)


@_or_ray
def get_actor(name, namespace=None):
    """The handle of a named actor. ValueError if there is none."""
    return _handle(*_here().call('get_actor', name))


@_or_ray
def nodes():
    return _here().call('info', 'nodes')


@_or_ray
def cluster_resources():
    return _here().call('info', 'total')


@_or_ray
def available_resources():
    return _here().call('info', 'free')


@_or_ray
def get_gpu_ids():
    return [g for g in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if g] if _current.get().get('need', {}).get('GPU') else []


@_or_ray
def method(**options):
    """@actors.method(num_returns=2) on an actor's method."""
    bad = set(options) - {'num_returns'}
    if bad:
        raise ValueError(f'method option {bad}: num_returns is the one there is')
    def mark(f):
        f._actors_method = options
        return f
    return mark


@_or_ray
def get_runtime_context():
    return _Context()


class _Context:
    """What runs here: ids as hex, None outside of a task."""
    def __init__(self):
        self._info, self._session = _current.get(), _here()
    @property
    def _actor(self):
        return self._info.get('actor') or {}
    def get_task_id(self):
        return self._info['task'].hex() if self._info else None
    def get_actor_id(self):
        return self._actor['id'].hex() if self._actor else None
    def get_actor_name(self):
        return self._actor.get('name') if self._actor else None
    def get_node_id(self):
        return self._session.node
    def get_worker_id(self):
        return self._session.prefix.hex()
    def get_job_id(self):
        return self._session.prefix[:4].hex()
    def get_assigned_resources(self):
        return dict(self._info.get('need', {}))
    def get_accelerator_ids(self):
        return {'GPU': get_gpu_ids()}
    @property
    def was_current_actor_reconstructed(self):
        return bool(self._actor.get('restarted'))
    @property
    def current_actor(self):
        if not self._actor:
            raise RuntimeError('current_actor: this is no actor')
        return _handle(self._actor['id'], self._actor['meta'], counted=False)


os.register_at_fork(after_in_child=lambda: globals().update(_session=None))  # a child of the user's own fork is not this session


def _exit_actor():
    """Ends the actor that calls it; no restart."""
    raise _Exit(0)


# -- options
_COMMON = {'num_cpus', 'num_gpus', 'resources', 'name', 'scheduling_strategy', 'runtime_env'}
_TASK = _COMMON | {'num_returns', 'max_retries', 'retry_exceptions'}
_ACTOR = _COMMON | {'max_restarts', 'max_task_retries', 'max_concurrency', 'get_if_exists', 'lifetime'}
_Plan = collections.namedtuple('_Plan', 'num_returns need strategy env retries retry_exc')


def _check_options(options, known, what):
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(f'Invalid option keyword {key} for {what}' + (f', did you mean {near[0]}?' if near else f'. Valid ones are {sorted(known)}'))
        if key in ('num_cpus', 'num_gpus', 'num_returns') and (not isinstance(value, (int, float)) or value < 0):
            raise ValueError(f'The quantity of {key} cannot be negative or no number: got {value!r}')
    if options.get('num_gpus', 0) > 1 and options['num_gpus'] % 1:
        raise ValueError(f"num_gpus {options['num_gpus']}: a share below 1, or whole GPUs")
    if options.get('lifetime') not in (None, 'detached'):
        raise ValueError(f"lifetime {options['lifetime']!r}: None or 'detached'")
    bad = set(options.get('runtime_env') or ()) - {'env_vars'}
    if bad:
        raise ValueError(f'runtime_env {sorted(bad)}: only env_vars is there; the rest needs backend="ray"')
    return options


def _plan(options, name, default_cpus):
    cpus = options.get('num_cpus', default_cpus)
    need = {'CPU': cpus, 'GPU': options.get('num_gpus', 0), **(options.get('resources') or {})}
    env = {k: str(v) for k, v in (options.get('runtime_env') or {}).get('env_vars', {}).items()}
    if 'num_cpus' in options or 'OMP_NUM_THREADS' not in os.environ:  # asked for here, or Ray's rule: as many threads as CPUs
        env.setdefault('OMP_NUM_THREADS', str(max(1, int(cpus))))
    else:
        env.setdefault('OMP_NUM_THREADS', os.environ['OMP_NUM_THREADS'])
    need = {k: v for k, v in need.items() if v}
    retry = options.get('retry_exceptions', False)
    return _Plan(int(options.get('num_returns', 1)), need, _strategy(options.get('scheduling_strategy'), need, name), tuple(sorted(env.items())),
                 options.get('max_retries', 3), retry if isinstance(retry, bool) else _Packed(tuple(retry)).join())


def _strategy(s, need, name):
    if s is None or s in ('DEFAULT', 'SPREAD'):
        return (s or 'DEFAULT',)
    if isinstance(s, NodeAffinitySchedulingStrategy):
        return 'node', s.node_id, s.soft
    if not isinstance(s, PlacementGroupSchedulingStrategy):
        raise ValueError(f'scheduling_strategy {s!r}: DEFAULT, SPREAD, PlacementGroupSchedulingStrategy or NodeAffinitySchedulingStrategy')
    group, i = s.placement_group, s.placement_group_bundle_index
    if not -1 <= i < group.bundle_count:
        raise ValueError(f'placement group bundle index {i} is invalid: 0 to {group.bundle_count - 1}, or -1 for any')
    if not any(all(b.get(k, 0) >= v for k, v in need.items()) for b in (group.bundle_specs if i < 0 else group.bundle_specs[i:i + 1])):
        raise ValueError(f'Cannot schedule {name} with the placement group: {need} cannot fit into any bundle of {group.bundle_specs}')
    return 'group', group.id, i


def _signature(f, skip):
    """Only the shape: names and kinds; defaults and annotations may be anything, and handles travel."""
    parameters = list(inspect.signature(f).parameters.values())[skip:]
    return inspect.Signature([p.replace(default=p.empty if p.default is p.empty else None, annotation=p.empty) for p in parameters])


def _arity(sig):
    """(fewest, most) positional arguments, so that the usual call is checked by two comparisons."""
    plain = [p for p in sig.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    must_name = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in sig.parameters.values())
    star = any(p.kind is p.VAR_POSITIONAL for p in sig.parameters.values())
    return 1 << 30 if must_name else sum(p.default is p.empty for p in plain), 1 << 30 if star else len(plain)


def _check_call(sig, arity, args, kwargs):
    if kwargs or not arity[0] <= len(args) <= arity[1]:
        sig.bind(*args, **kwargs)  # TypeError says what is wrong


def remote(*args, **options):
    """@actors.remote or @actors.remote(num_cpus=2, ...) on a function or a class. Call f.remote(...), Class.remote(...); .options(...) overrides."""
    def wrap(target):
        if inspect.isclass(target):
            return ActorClass(target, _check_options(options, _ACTOR, 'actors'))
        if not callable(target):
            raise TypeError('The @actors.remote decorator must be applied to a function or a class')
        if inspect.isgeneratorfunction(target):
            raise TypeError(f'{target.__name__} is a generator: return a list, or let an actor be called repeatedly')
        return RemoteFunction(target, _check_options(options, _TASK, 'remote functions'))
    return wrap(args[0]) if len(args) == 1 and not options and callable(args[0]) else wrap


class RemoteFunction:
    def __init__(self, function, options):
        self._function, self._options = function, options
        functools.update_wrapper(self, function)
        self._cache = None
    def __getstate__(self):
        return self._function, self._options
    def __setstate__(self, state):
        self.__init__(*state)
    def __call__(self, *args, **kwargs):
        raise TypeError(f"Remote functions cannot be called directly. Instead of running '{self.__name__}()', try '{self.__name__}.remote()'.")
    def options(self, **options):
        return RemoteFunction(self._function, {**self._options, **_check_options(options, _TASK, 'remote functions')})
    def remote(self, *args, **kwargs):
        ray = _ray()
        session = ray or _here()
        if self._cache is None or self._cache[0] is not session:
            if ray:
                self._cache = ray, ray.remote(**self._options)(self._function) if self._options else ray.remote(self._function)
            else:
                sig = _signature(self._function, 0)
                self._cache = session, (sig, _arity(sig), session.export(self._function), _plan(self._options, self.__name__, 1))
        ready = self._cache[1]
        if ray:
            return ready.remote(*args, **kwargs)
        sig, arity, fid, plan = ready
        _check_call(sig, arity, args, kwargs)
        return session.submit('task', self._options.get('name') or self.__qualname__, fid, None, args, kwargs, plan)


class ActorClass:
    def __init__(self, cls, options):
        self._class, self._options, self.__name__, self.__doc__ = cls, options, cls.__name__, cls.__doc__
    def __getstate__(self):
        return self._class, self._options
    def __setstate__(self, state):
        self.__init__(*state)
    def __call__(self, *args, **kwargs):
        raise TypeError(f"Actors cannot be instantiated directly. Instead of '{self.__name__}()', use '{self.__name__}.remote()'.")
    def options(self, **options):
        return ActorClass(self._class, {**self._options, **_check_options(options, _ACTOR, 'actors')})
    def remote(self, *args, **kwargs):
        ray, cls, o = _ray(), self._class, self._options
        methods = {k: m for k, m in inspect.getmembers(cls, callable) if inspect.isroutine(m) and not (k.startswith('__') and k != '__call__')}
        if ray:
            for m in methods.values():
                if hasattr(m, '_actors_method'):
                    ray.method(**m._actors_method)(m)
            return (ray.remote(**o)(cls) if o else ray.remote(cls)).remote(*args, **kwargs)
        session = _here()
        if cls.__init__ is not object.__init__:
            _signature(cls.__init__, 1).bind(*args, **kwargs)
        elif args or kwargs:
            raise TypeError('too many positional arguments')
        shapes = {}
        for k, m in methods.items():
            raw = inspect.getattr_static(cls, k)
            try:
                shapes[k] = _signature(m, 0 if isinstance(raw, (staticmethod, classmethod)) else 1), getattr(m, '_actors_method', {}).get('num_returns', 1)
            except ValueError:  # a C function without a signature: any arguments
                shapes[k] = inspect.Signature([inspect.Parameter('args', inspect.Parameter.VAR_POSITIONAL)]), 1
        name, meta = f'{self.__name__}.__init__', pickle.dumps((self.__name__, shapes), 5)
        aid = session.new_id() + b'\xfe\xff'
        plan = _plan({k: v for k, v in o.items() if k != 'name'}, self.__name__, 0)
        extra = {'id': aid, 'max_concurrency': o.get('max_concurrency'), 'meta': meta, 'name': o.get('name') or ''}
        create = o.get('max_restarts', 0), o.get('max_task_retries', 0), o.get('name'), o.get('get_if_exists', False), o.get('lifetime') == 'detached', meta
        return _handle(*session.submit('create', name, session.export(cls), None, args, kwargs, plan, actor=aid, extra=extra, create=create))


_CALL = _Plan(1, {}, ('DEFAULT',), (), 0, False)


class ActorMethod:
    __slots__ = '_handle', '_name', '_sig', '_arity', '_plan', '_full'
    def __init__(self, handle, name, sig, arity, plan):
        self._handle, self._name, self._sig, self._arity, self._plan, self._full = handle, name, sig, arity, plan, f'{handle._class_name}.{name}'
    def __call__(self, *args, **kwargs):
        raise TypeError(f"Actor methods cannot be called directly. Instead of running 'object.{self._name}()', try 'object.{self._name}.remote()'.")
    def options(self, **options):
        _check_options(options, {'num_returns'}, 'actor methods')
        return ActorMethod(self._handle, self._name, self._sig, self._arity, self._plan._replace(**options))
    def remote(self, *args, **kwargs):
        _check_call(self._sig, self._arity, args, kwargs)
        ref = self._handle._ref
        if ref._session is not _session:
            raise ValueError(f'{self._handle!r} is of an earlier session')
        return _session.submit('call', self._full, None, self._name, args, kwargs, self._plan, actor=ref._id)


class ActorHandle:
    """Calls of one process run in the order they were made (max_concurrency=1). The last handle gone, the actor ends."""
    def __init__(self, ref, meta):
        self._ref, self._meta = ref, meta
        self._class_name, shapes = pickle.loads(meta)
        self._methods = {name: (sig, _arity(sig), _CALL._replace(num_returns=n)) for name, (sig, n) in shapes.items()}
    def __getattr__(self, name):
        methods = self.__dict__.get('_methods', {})
        if name not in methods:
            raise AttributeError(f"actor {self.__dict__.get('_class_name')} has no method {name!r}")
        return ActorMethod(self, name, *methods[name])
    def __reduce__(self):
        return ActorHandle, (self._ref, self._meta)
    def __repr__(self):
        return f'Actor({self._class_name}, {self._ref.hex()})'
    def __eq__(self, other):
        return isinstance(other, ActorHandle) and other._ref == self._ref
    def __hash__(self):
        return hash(self._ref)


def _handle(aid, meta, counted=True):
    return ActorHandle(ObjectRef(aid, counted), meta)


# -- util: placement groups, strategies, pool
class PlacementGroup:
    """A reservation. bundle_specs as asked for; ready() is a ref that is there once all bundles are reserved."""
    def __init__(self, id, bundles):
        self.id, self.bundle_specs, self.bundle_count = id, bundles, len(bundles)
    def ready(self):
        session = _here()
        oid = session.new_id() + b'\xff\xff'
        session.post(('group_ready', 0, self.id, oid), _Packed(self).join())
        return ObjectRef(oid, True)
    def wait(self, timeout_seconds=30):
        return bool(wait([self.ready()], timeout=timeout_seconds)[0])


def placement_group(bundles, strategy='PACK', name='', lifetime=None):
    """Reserve bundles ([{'CPU': 2, 'GPU': 1}, ...]) all or none. PACK: on few nodes, SPREAD: on many, STRICT_: insist. Returns at once."""
    if not isinstance(bundles, list) or not bundles or not all(isinstance(b, dict) for b in bundles):
        raise ValueError(f'bundles must be a non-empty list of resource dictionaries such as [{{"CPU": 1}}, {{"GPU": 1}}], got {bundles!r}')
    bundles = [{k: v for k, v in b.items() if v} for b in bundles]
    if not all(bundles) or any(v < 0 for b in bundles for v in b.values()):
        raise ValueError(f'a bundle asks for something, and for no negative amount: got {bundles}')
    if strategy not in ('PACK', 'SPREAD', 'STRICT_PACK', 'STRICT_SPREAD'):
        raise ValueError(f'Invalid placement group strategy {strategy!r}: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD')
    session = _here()
    group = PlacementGroup(session.new_id(), bundles)
    session.call('group', group.id, bundles, strategy, name)
    return group


def remove_placement_group(group):
    """Gives the reservation back; tasks and actors in it are killed."""
    _here().call('remove_group', group.id)


class PlacementGroupSchedulingStrategy:
    def __init__(self, placement_group, placement_group_bundle_index=-1, placement_group_capture_child_tasks=None):
        if placement_group_capture_child_tasks:
            raise ValueError('placement_group_capture_child_tasks: give children their own strategy')
        self.placement_group, self.placement_group_bundle_index = placement_group, placement_group_bundle_index


class NodeAffinitySchedulingStrategy:
    def __init__(self, node_id, soft):
        self.node_id, self.soft = node_id, soft


class ActorPool:
    """Hands values to whichever actor is free: pool.map(lambda actor, value: actor.work.remote(value), values)."""
    def __init__(self, actors):
        self._idle, self._busy, self._order, self._waiting, self._next, self._sent = list(actors), {}, {}, collections.deque(), 0, 0
    def submit(self, fn, value):
        if not self._idle:
            self._waiting.append((fn, value))
            return
        actor = self._idle.pop()
        ref = fn(actor, value)
        self._busy[ref], self._order[self._sent] = (self._sent, actor), ref
        self._sent += 1
    def has_next(self):
        return bool(self._busy)
    def has_free(self):
        return bool(self._idle) and not self._waiting
    def push(self, actor):
        self._idle.append(actor)
        if self._waiting:
            self.submit(*self._waiting.popleft())
    def pop_idle(self):
        return self._idle.pop() if self.has_free() else None
    def _take(self, ref):
        i, actor = self._busy.pop(ref)
        del self._order[i]
        self.push(actor)
        return get(ref)
    def get_next(self, timeout=None):
        """The next result in the order of submission. StopIteration when there is none, TimeoutError."""
        if not self.has_next():
            raise StopIteration('No more results to get')
        if self._next not in self._order:
            raise ValueError('get_next() after get_next_unordered() is not allowed')
        ref = self._order[self._next]
        if not wait([ref], timeout=timeout)[0]:
            raise TimeoutError('Timed out waiting for result')
        self._next += 1
        return self._take(ref)
    def get_next_unordered(self, timeout=None):
        """Whichever result comes first."""
        if not self.has_next():
            raise StopIteration('No more results to get')
        ready, _ = wait(list(self._busy), timeout=timeout)
        if not ready:
            raise TimeoutError('Timed out waiting for result')
        self._next = max(self._next, self._busy[ready[0]][0] + 1)
        return self._take(ready[0])
    def map(self, fn, values):
        for value in values:
            self.submit(fn, value)
        return iter(lambda: self.get_next() if self.has_next() else _END, _END)
    def map_unordered(self, fn, values):
        for value in values:
            self.submit(fn, value)
        return iter(lambda: self.get_next_unordered() if self.has_next() else _END, _END)


_END = object()


class _Names(types.ModuleType):
    """actors.util, actors.exceptions ...: our names, or Ray's own while Ray is what runs (look them up after init, not before)."""
    def __init__(self, path, **table):
        super().__init__(f'actors.{path}')
        self._path, self._table = path, table
        sys.modules[f'actors.{path}'] = self
    def __getattr__(self, name):
        if name in self.__dict__.get('_table', ()):
            ray = _ray()
            return getattr(importlib.import_module(f'ray.{self._path}'), name) if ray else self._table[name]
        raise AttributeError(f'{self.__name__} has no {name!r}')


exceptions = _Names('exceptions', **{k: v for k, v in list(globals().items()) if isinstance(v, type) and issubclass(v, RayError)})
actor = _Names('actor', exit_actor=_exit_actor, ActorHandle=ActorHandle, ActorClass=ActorClass)
util = _Names('util', placement_group=placement_group, remove_placement_group=remove_placement_group, ActorPool=ActorPool)
util.scheduling_strategies = _Names('util.scheduling_strategies', PlacementGroupSchedulingStrategy=PlacementGroupSchedulingStrategy,
                                    NodeAffinitySchedulingStrategy=NodeAffinitySchedulingStrategy)


# ---- a cluster: the head, a node, the status ---------------------------------------------------------------------------------------------------
def _serve_head(host, port, machine):
    """The head of a cluster; never returns. Loopback needs no ceremony, any other address a token of the user's own."""
    token, loopback = os.environ.get('ACTORS_TOKEN'), host in ('127.0.0.1', 'localhost', '::1')
    if not loopback and not token:
        raise ValueError(f'--host={host} is open to others: set ACTORS_TOKEN to a secret of 16 characters or more (python -c "import secrets; print(secrets.token_hex())")')
    if token and len(token) < 16:
        raise ValueError(f'ACTORS_TOKEN has {len(token)} characters: 16 or more')
    made, token = not token, token or secrets.token_hex(16)
    hub = _Hub(*machine, listen=(host, port), token=token)
    file = _token_file(hub.address.rpartition(':')[2])
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), 'w') as f:
        os.fchmod(f.fileno(), 0o600)
        f.write(token)
    print(f'actors: head at {hub.address}, pid {os.getpid()}' + (f'\ntoken: {token}' if made else ''), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while hub.thread.is_alive():
            hub.thread.join(1)
    finally:
        hub.close()
        os.unlink(file)


def _serve_node(address, machine):
    """A node of a cluster: starts and ends workers, moves objects, says every second that it lives. Ends with its head."""
    token = _find_token(address)
    (resources, gpus, capacity), store = machine, _Store(machine[2])
    sock = _connect(address, token)
    link = _Remote(sock, secrets.token_hex(16), store)
    nursery = _Nursery(store)
    link.post(('hello', 1, 'node', {'id': link.node, 'resources': resources, 'gpus': list(gpus), 'capacity': store.capacity, 'host': socket.gethostname()}))
    print(f'actors: node {link.node[:8]} of {address}, pid {os.getpid()}, {resources}', flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    beat = heard = time.monotonic()
    told = _poll(sock, nursery.sock)
    try:
        while True:
            ready = told(BEAT)
            if time.monotonic() - beat > BEAT:
                beat = time.monotonic()
                link.post(('beat', 0))
            if nursery.sock.fileno() in ready:
                exits = nursery.read()
                if exits is None:
                    raise RaySystemError('the worker zygote died')
                for wid, why in exits:
                    link.post(('exited', 0, wid, why))
            if sock.fileno() in ready:
                heard = time.monotonic()
                data = sock.recv(1 << 20)
                if not data:
                    raise ConnectionError(f'the head at {address} closed the connection')
                for msg, tail in link.feed(data):
                    _node_order(msg, tail, link, nursery, store, address, token)
            elif time.monotonic() - heard > 2 * SILENCE:
                raise ConnectionError(f'nothing from the head at {address} for {2 * SILENCE:.0f} s')
    finally:
        nursery.close()


def _node_order(msg, tail, link, nursery, store, address, token):
    op, *args = msg
    if op == 'spawn':
        nursery.spawn(args[0], link.node, args[1], address=address, token=token)
    elif op == 'kill':
        nursery.kill(args[0])
    elif op == 'read':
        link.post(('answer', 0, args[0]), bytes(store.view(args[1])))
    elif op == 'write':
        store.write(args[1], lambda put: put(0, tail))
        link.post(('answer', 0, args[0]))


def _statuses(address):
    """What runs: the cluster at address, else every session of this user on this machine."""
    if address:
        init(address=address)
        return [_session.call('info', 'status', timeout=HANDSHAKE)]
    found = []
    prefix = f'@actors-{os.getuid()}-'
    paths = {line.split()[-1] for line in open('/proc/net/unix') if prefix in line} if sys.platform == 'linux' else ()
    for path in sorted(paths):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            try:
                sock.connect('\0' + path[1:])
                found.append(json.loads(b''.join(iter(lambda: sock.recv(1 << 16), b''))))
            except (OSError, ValueError) as e:
                print(f'{path}: {e}', file=sys.stderr)
    return found


def _print_status(address):
    found = _statuses(address)
    for s in found:
        print(f"session of pid {s['pid']}" + (f" at {s['address']}" if s['address'] else '') + f": {s['objects']} objects, {s['groups']} placement groups")
        for n in s['nodes']:
            use = ', '.join(f"{k} {v - n['free'].get(k, 0):g}/{v:g}" for k, v in n['total'].items())
            print(f"  node {n['id'][:8]} {n['host']}: {use}; {n['workers']} workers ({n['idle']} idle); store {n['used'] / 1e6:.1f}/{n['store'] / 1e6:.0f} MB, on disk {n['spilled'] / 1e6:.1f} MB")
        for a in s['actors']:
            print(f"  actor {a['class']} {a['name'] or a['id'][16:28]}: {a['state']}, pid {a['pid']}, node {a['node'][:8]}, queued {a['queued']}, running {a['running']}, restarts {a['restarts']}")
        for what in ('running', 'queued'):
            print(f'  tasks {what}: ' + (', '.join(f'{k} {v}' for k, v in s[what].items()) or 'none'))
    if not found:
        print('actors: no session of yours runs on this machine (for a cluster: --address=HOST:PORT)')


if __name__ == '__main__':
    head = False              # --head=True: start a cluster
    host = '127.0.0.1'        # the head's address; another than loopback needs ACTORS_TOKEN
    port = 6399               # the head's port; 0 = any free one
    address = ''              # HOST:PORT of a head: join it as a node (or ask it: status)
    num_cpus = -1             # resources of this node; -1 = what the machine has
    num_gpus = -1
    object_store_memory = 0   # bytes of the arena; 0 = 30 % of memory
    config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str)) and k.islower()]
    _status = 'status' in sys.argv[1:]
    sys.argv = [a for a in sys.argv if a != 'status']
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import actors  # one identity for every class, here as in the workers
    _machine_here = actors._machine(num_cpus if num_cpus >= 0 else None, num_gpus if num_gpus >= 0 else None, None, object_store_memory)
    try:
        if _status:
            actors._print_status(address)
        elif head:
            actors._serve_head(host, port, _machine_here)
        elif address:
            actors._serve_node(address, _machine_here)
        else:
            sys.exit('error: --head=True starts a cluster, --address=HOST:PORT joins one, status shows what runs')
    except (actors.RayError, ConnectionError) as _e:
        sys.exit(f'error: {_e}')
