"""Tasks, actors and a shared object store: Ray's names and rules in one file, on processes of this machine, on a few machines, or on Ray.

    import actors
    actors.init(num_cpus=4)                     # init(backend='ray'): the same program, unchanged, on real Ray

    @actors.remote
    def square(x): return x * x
    print(actors.get([square.remote(i) for i in range(4)]))     # [0, 1, 4, 9]

    python actors.py --head=True --port=6399                    # a cluster: one head (it prints a token) ...
    python actors.py --address=HOST:6399 --num_cpus=4           # ... nodes (ACTORS_TOKEN as printed),
                                                                # and programs: init(address='HOST:6399')

A call's way, from f.remote(x) to get(ref)

    the program (driver)         the runtime: a thread of the driver, or the head            a worker
    --------------------         ---------------------------------------------------         -----------------------
    f.remote(x)
      x -> bytes (_Packed)
      _Session.submit  --------> on_submit: a _Task, an _Object for its result
      ObjectRef <- an id         enqueue: do all its arguments exist?
                                 _Scheduler: where are its CPUs and GPUs free?
                                 start: an idle worker, or one that the zygote forks
                                 run_on: "run", arguments -----------------------------> _Worker.run: f(x)
                                                                                         result -> bytes;
                                 _Directory.fulfil: the object is there <--- "done" ---- over 100 KB: into the arena
    get(ref)  -----------------> on_get: wait for the object
      bytes -> value <---------- its bytes, or its place in the arena

An actor's method takes the same way, but into the actor's queue: its process is chosen once, its calls run in the order they were made.

How it works, in the order of this file
1. Values travel as pickle 5: arrays and tensors out of band, functions and classes of the running script by value (code + globals + closure).
2. A value above 100 KB is written once into the arena, an anonymous memory file that all processes of the machine share. It is read in place:
   arrays through a read-only map, tensors copy-on-write. The file has no name, so nothing can be left behind.
3. The directory knows every object: its place, who refers to it, who waits for it. The scheduler knows what is free where. The runtime moves
   tasks and actors between the two. All state is behind one lock; whoever calls sends (operation, request number, arguments).
4. Workers are forked by the zygote, a small single-threaded process which has NumPy (and torch, if the driver has it) imported and nothing
   else: a start costs milliseconds and inherits no thread, lock or CUDA context. When the driver dies, its sockets close; by that the zygote,
   the workers and all that they started end too.
5. Over TCP both sides prove that they know the token (HMAC-SHA256 of fresh nonces) before anything is unpickled. After that the peer is
   trusted and the bytes are not encrypted: a cluster is for one private network, or for ssh tunnels. All objects live in the head's arena:
   a worker on another node gets a copy of its own, and no object is lost with a node.

Left out, and refused by name: generators, coroutine methods and `await ref`, detached actors, namespaces, runtime_env (but env_vars), spilling
to disk. Left out silently by Ray's own rules: nothing. Whoever needs them has backend='ray'.
"""
import atexit
import bisect
import collections
import contextlib
import contextvars
import ctypes
import dataclasses
import difflib
import dis
import enum
import functools
import glob
import hashlib
import hmac
import importlib
import inspect
import io
import itertools
import marshal
import math
import mmap
import os
import pickle
import queue
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait as _wait_for_any

import numpy as np

INLINE = 100 << 10        # bytes; a value above it goes through the arena (Ray's limit)
MAX_FRAME = 1 << 38       # bytes; a frame that announces more ends the connection
BEAT, SILENCE = 1.0, 8.0  # seconds between a node's heartbeats; silence after which it is taken for dead
HANDSHAKE = 10.0          # seconds that a stranger has to prove itself
STRANGERS = 64            # handshakes at once; more are turned away
PRELOAD = ['torch']       # imported once by the zygote if the driver has it, not by every worker (seconds each)
_session = None           # this process's connection to a runtime; None before init, and under backend='ray'


# ---- errors: Ray's names -----------------------------------------------------------------------------------
class RayError(Exception): 'Whatever goes wrong here.'
class RayTaskError(RayError):
    """A task or method raised. str() is the remote traceback, .cause the user's exception (None where it could not be
    sent); get() raises it as an instance of the cause's class too."""
    def __init__(self, function_name, traceback_str, cause=None):
        super().__init__(function_name, traceback_str, cause)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause

    def __str__(self):
        return self.traceback_str

    def __reduce__(self):
        """The cause travels in an envelope of its own: whoever cannot open it still has the words."""
        try:
            sealed = _Packed(self.cause).join()
        except Exception as e:
            note = f'\n(the exception itself could not be sent: {type(e).__name__}: {e})'
            return RayTaskError, (self.function_name, self.traceback_str + note)
        return _open_task_error, (self.function_name, self.traceback_str, sealed)

    def as_instanceof_cause(self):
        kind = type(self.cause)
        if not issubclass(kind, Exception) or issubclass(RayTaskError, kind):
            return self
        space = {'__module__': __name__, '__getattr__': lambda self, name: getattr(self.__dict__['cause'], name)}
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
class ActorUnavailableError(RayActorError): 'The actor died in this call and is being restarted; it may or may not have run.'
class GetTimeoutError(RayError, TimeoutError): 'get() waited as long as it was told to.'
class ObjectLostError(RayError): 'The object is not there: freed, or of an earlier session.'
class ObjectStoreFullError(RayError): 'The arena has no room.'
class RaySystemError(RayError): 'The runtime itself failed, or is gone, or a value cannot be read here.'
class AuthenticationError(RayError): 'The other side of a connection does not know the token.'
class TaskUnschedulableError(RayError): 'The node that the task insists on is gone.'
class ActorUnschedulableError(RayError): 'The node that the actor insists on is gone.'
class TaskPlacementGroupRemoved(RayError): 'The placement group of the task was removed.'
class ActorPlacementGroupRemoved(RayError): 'The placement group of the actor was removed.'
class ActorAlreadyExistsError(ValueError, RayError): 'The name is taken.'


def _open_task_error(function_name, text, sealed):
    try:
        return RayTaskError(function_name, text, _unpack(sealed))
    except Exception as e:
        note = f'\n(the exception itself could not be read here: {type(e).__name__}: {e})'
        return RayTaskError(function_name, text + note)


# ---- values to bytes and back ------------------------------------------------------------------------------
@functools.lru_cache(None)
def _findable(package):
    finders = [finder for finder in sys.meta_path if hasattr(finder, 'find_spec')]
    return any(finder.find_spec(package, None) for finder in finders)


def _importable(obj):
    """Can another process reach this function or class as module.qualname? If not, it travels by value."""
    module = getattr(obj, '__module__', None)
    if module == 'builtins':
        return True
    if module in (None, '__main__', '__mp_main__') or '<' in obj.__qualname__:
        return False
    if not _findable(module.partition('.')[0]):
        return False
    found = sys.modules.get(module)
    for part in obj.__qualname__.split('.'):
        found = getattr(found, part, None)
    return found is obj


def _global_names(code):
    loads = ('LOAD_GLOBAL', 'STORE_GLOBAL', 'LOAD_NAME')
    names = {i.argval for i in dis.get_instructions(code) if i.opname in loads}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return names.union(*map(_global_names, inner))


def _new_function(code, space, name, cells):
    space.setdefault('__builtins__', __builtins__)
    closure = tuple(types.CellType() for _ in range(cells))
    return types.FunctionType(marshal.loads(code), space, name, None, closure or None)


def _fill_function(f, state):
    """The second half of unpickling a function: by now it exists, so that what it refers to may refer to it."""
    space, modules, cells, attributes = state
    for module in modules:  # `import a.b` binds only a, yet the code says a.b
        importlib.import_module(module)
    f.__globals__.update(space)
    for cell, filled in zip(f.__closure__ or (), cells):
        if filled:
            cell.cell_contents = filled[0]
    for key, value in attributes.items():
        setattr(f, key, value)


# A class that travelled by value keeps one identity in a process: `except MyError` in the script catches what a worker raised
_class_keys = weakref.WeakKeyDictionary()  # class: its key
_classes = weakref.WeakValueDictionary()   # key: class
_unfilled = set()                          # keys of classes that were made here and have no attributes yet


def _new_class(key, meta, name, bases, first):
    def body(space):
        for attribute, value in first.items():  # one by one: an enum's namespace takes notes on assignment
            space[attribute] = value
    if key not in _classes:
        made = types.new_class(name, bases, {'metaclass': meta}, body)
        _classes[key], _class_keys[made] = made, key
        _unfilled.add(key)
    return _classes[key]


def _fill_class(cls, state):
    key = _class_keys[cls]
    if key in _unfilled:
        _unfilled.remove(key)
        for name, value in state.items():
            type.__setattr__(cls, name, value)


def _cached_property(func, name):
    made = functools.cached_property(func)
    made.__set_name__(None, name)
    return made


def _proxy(mapping):
    return types.MappingProxyType(mapping)


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
    """CPU tensors out of band. They come back writable: a write lands in the reader's own copy-on-write page."""
    plain = type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout == torch.strided and not t.is_quantized
    if not plain or t.device.type != 'cpu' or not t.numel():
        return NotImplemented
    flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(raw), t.dtype, tuple(t.shape), t.requires_grad, type(t))


_BY_PARTS = {  # type: how to make it again
    np.ndarray: _array,
    types.ModuleType: lambda m: (importlib.import_module, (m.__name__,)),
    types.MappingProxyType: lambda m: (_proxy, (dict(m),)),
    property: lambda p: (property, (p.fget, p.fset, p.fdel, p.__doc__)),
    classmethod: lambda m: (classmethod, (m.__func__,)),
    staticmethod: lambda m: (staticmethod, (m.__func__,)),
    functools.cached_property: lambda p: (_cached_property, (p.func, p.attrname)),
}


class _Pickler(pickle.Pickler):
    """Pickle 5 plus what the standard leaves out: functions and classes by value, arrays and tensors out of band;
    the refs inside are noted in .contained, where the runtime counts them."""
    def __init__(self, file):
        self.buffers, self.contained, self.spaces = [], [], {}
        super().__init__(file, 5, buffer_callback=self.buffers.append)

    def reducer_override(self, obj):
        kind = type(obj)
        if kind in _BY_PARTS:
            return _BY_PARTS[kind](obj)
        if kind is ObjectRef:
            self.contained.append(obj._valid_id())
            return ObjectRef, (obj._id,)
        if kind is types.FunctionType:
            return NotImplemented if _importable(obj) else self.function(obj)
        if issubclass(kind, type):
            return NotImplemented if _importable(obj) else self.by_value(obj)
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
        modules = [m for m in list(sys.modules)
                   if prefixes and m.startswith(prefixes) and set(m.split('.')[1:]) <= set(f.__code__.co_names)]
        # functions of one module share their globals there too: one dict, so one entry in the pickler's memo
        shared = self.spaces.setdefault(id(space), {'__name__': space.get('__name__')})
        cells = []
        for cell in f.__closure__ or ():
            try:
                cells.append((cell.cell_contents,))
            except ValueError:  # not bound yet
                cells.append(())
        attributes = {'__qualname__': f.__qualname__, '__doc__': f.__doc__, '__defaults__': f.__defaults__,
                      '__kwdefaults__': f.__kwdefaults__, **f.__dict__}
        start = marshal.dumps(f.__code__), shared, f.__name__, len(cells)
        return _new_function, start, (used, modules, cells, attributes), None, None, _fill_function

    def by_value(self, cls):
        key = _class_keys.setdefault(cls, secrets.token_bytes(12))
        _classes[key] = cls
        slots = types.MemberDescriptorType, types.GetSetDescriptorType
        state = {k: v for k, v in vars(cls).items() if not isinstance(v, slots) and k != '_abc_impl'}
        first = {k: state.pop(k) for k in ('__module__', '__slots__') if k in state}
        first['__qualname__'] = cls.__qualname__
        if issubclass(cls, enum.Enum):  # its members must be there when the class is made
            first |= {member.name: member.value for member in cls}
            kept = types.FunctionType, classmethod, staticmethod, property
            made = '__new__', '_generate_next_value_'
            state = {k: v for k, v in state.items() if isinstance(v, kept) and k not in made}
        start = key, type(cls), cls.__name__, cls.__bases__, first
        return _new_class, start, state, None, None, _fill_class


_WRITABLE = 1 << 63  # in the count of buffers: there are tensors, whose reader may write to its copy


class _Packed:
    """A value as bytes: head (counts, table, pickle), then the out-of-band buffers, each on a 64-byte boundary.
    .size is the whole, .contained the ids of the refs inside."""
    def __init__(self, value):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        data, raws = file.getvalue(), [buffer.raw() for buffer in pickler.buffers]
        table, self.chunks, self.contained = [], [], pickler.contained
        self.size = 16 + 16 * len(raws) + len(data)
        for raw in raws:
            at = -(-self.size // 64) * 64
            table += at, raw.nbytes
            self.chunks.append((at, raw))
            self.size = at + raw.nbytes
        flag = _WRITABLE if any(not raw.readonly for raw in raws) else 0
        self.head = struct.pack(f'<{2 + len(table)}Q', len(raws) | flag, len(data), *table) + data

    def write(self, buffer):
        buffer[:len(self.head)] = self.head
        for at, raw in self.chunks:
            buffer[at:at + raw.nbytes] = raw

    def join(self):
        if not self.chunks:
            return self.head
        blob = bytearray(self.size)
        self.write(blob)
        return bytes(blob)


def _unpack(blob):
    count, size = struct.unpack_from('<2Q', blob)
    count &= ~_WRITABLE
    if count and isinstance(blob, bytes):
        blob = bytearray(blob)  # a small tensor may be written to; an array is read-only by what its pickle says
    view = memoryview(blob)
    table = struct.unpack_from(f'<{2 * count}Q', view, 16)
    start = 16 + 16 * count
    buffers = [view[at:at + n] for at, n in zip(table[::2], table[1::2])]
    return pickle.loads(view[start:start + size], buffers=buffers)


def _pack_error(error):
    return _Packed(error).join()


# ---- the store: one file in memory -------------------------------------------------------------------------
class _Free:
    """First fit over one file, in pages. Low addresses first: pages once touched are used again (33 GB/s against
    1.5 GB/s into fresh ones)."""
    def __init__(self, capacity):
        self.capacity, self.used, self.holes = capacity, 0, [(0, capacity)]

    def take(self, size):
        """-> the offset, None without room."""
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
        if i < len(self.holes) and self.holes[i][0] == at + size:  # the hole behind joins
            size += self.holes.pop(i)[1]
        if i and sum(self.holes[i - 1]) == at:  # the hole before joins
            at, before = self.holes.pop(i - 1)
            size, i = before + size, i - 1
        self.holes.insert(i, (at, size))


class _Private(mmap.mmap):
    """One object mapped copy-on-write. The tensors in it keep the map, the map keeps .ref, the ref keeps the object."""


class _Shared(np.ndarray):
    """One object in the process's read-only map of the whole arena, which is made once and stays. Keeps .ref likewise."""


class _Arena:
    """This process's maps of the shared file. A place in it is (offset, size); who may write where is the runtime's business."""
    def __init__(self, capacity, fd=None):
        self.capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd, self.writing, self.reading = fd, None, None
        if fd is None:
            if hasattr(os, 'memfd_create'):
                self.fd = os.memfd_create('actors-arena')
            else:  # macOS
                with tempfile.TemporaryFile(prefix='actors-') as file:
                    self.fd = os.dup(file.fileno())
            os.ftruncate(self.fd, self.capacity)

    def room(self, place):
        """The bytes of a place, to write to."""
        self.writing = self.writing or memoryview(mmap.mmap(self.fd, self.capacity))
        return self.writing[place[0]:place[0] + place[1]]

    def view(self, place, ref=None):
        """The bytes of a place, to read, without a copy; ref lives as long as anything made of them."""
        start, size = place
        self.reading = self.reading or mmap.mmap(self.fd, self.capacity, prot=mmap.PROT_READ)
        count, = struct.unpack_from('<Q', self.reading, start)
        if count & _WRITABLE:
            both = mmap.PROT_READ | mmap.PROT_WRITE
            view = _Private(self.fd, size, flags=mmap.MAP_PRIVATE, prot=both, offset=start)
            view.ref = ref
            return view
        view = np.frombuffer(self.reading, np.uint8, size, start).view(_Shared)
        view.ref = ref
        return memoryview(view)


# ---- connections: frames, and the handshake before the first ------------------------------------------------
# A frame is a pickled list of messages (operation, request number, arguments); multiprocessing's Connection puts its length before it.
def _send(connection, messages):
    connection.send_bytes(pickle.dumps(messages, 5))


def _receive(connection):
    return pickle.loads(connection.recv_bytes(MAX_FRAME))


def _hang_up(connection):
    """Ends it for both sides; whoever reads it in another thread wakes up."""
    with socket.socket(fileno=os.dup(connection.fileno())) as sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


_HELLO = f'actors/2 py{sys.version_info[0]}.{sys.version_info[1]}'.encode().ljust(16)  # code travels as bytecode


def _proof(token, who, first, second):
    return hmac.digest(token.encode(), who + first + second, 'sha256')


def _read_exactly(sock, n):
    data = b''
    while len(data) < n:
        more = sock.recv(n - len(data))
        if not more:
            raise ConnectionError('connection closed in the handshake')
        data += more
    return data


def _ready_for_frames(sock):
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(sock.detach())


def _admit(sock, token):
    """The server's half -> a Connection, None to whoever does not know the token. Every read has a fixed length;
    nothing of the peer's is interpreted before its proof."""
    sock.settimeout(HANDSHAKE)
    hello = _read_exactly(sock, 48)
    if hello[:16] != _HELLO:
        sock.sendall(b'V' + _HELLO + bytes(16))
        return None
    mine, theirs = secrets.token_bytes(32), hello[16:]
    sock.sendall(b'+' + mine)
    if not hmac.compare_digest(_read_exactly(sock, 32), _proof(token, b'client', theirs, mine)):
        sock.sendall(b'T' + bytes(32))
        return None
    sock.sendall(b'+' + _proof(token, b'server', theirs, mine))
    return _ready_for_frames(sock)


def _connect(address, token):
    """The client's half -> a Connection whose other end knows the token. ConnectionError, AuthenticationError."""
    host, _, port = address.rpartition(':')
    if not port.isdigit():
        raise ValueError(f'address {address!r}: expected HOST:PORT')
    try:
        sock = socket.create_connection((host or '127.0.0.1', int(port)), timeout=HANDSHAKE)
    except OSError as e:
        hint = f'start one: python actors.py --head=True --port={port}'
        raise ConnectionError(f'no head at {address} ({e}); {hint}') from None
    mine = secrets.token_bytes(32)
    sock.sendall(_HELLO + mine)
    answer = _read_exactly(sock, 33)
    if answer[:1] != b'+':
        version = answer[1:17].decode(errors='replace').strip()
        raise AuthenticationError(f'{address} runs {version!r}, this is {_HELLO.decode().strip()!r}: '
                                  'use one Python version everywhere')
    theirs = answer[1:]
    sock.sendall(_proof(token, b'client', mine, theirs))
    answer = _read_exactly(sock, 33)
    if answer[:1] != b'+' or not hmac.compare_digest(answer[1:], _proof(token, b'server', mine, theirs)):
        raise AuthenticationError(f'{address} refused the token: set ACTORS_TOKEN to what the head printed')
    return _ready_for_frames(sock)


def _token_file(port):
    folder = os.path.join(os.path.expanduser('~'), '.cache', 'actors')
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return os.path.join(folder, f'token-{port}')


def _find_token(address):
    """ACTORS_TOKEN, else the file that a head on this machine wrote for its port."""
    if os.environ.get('ACTORS_TOKEN'):
        return os.environ['ACTORS_TOKEN']
    file = _token_file(address.rpartition(':')[2])
    if not os.path.exists(file):
        raise ValueError(f'no token for {address}: set ACTORS_TOKEN to what the head printed')
    with open(file) as f:
        return f.read().strip()


# ---- records -----------------------------------------------------------------------------------------------
_record = functools.partial(dataclasses.dataclass, eq=False, slots=True)

# What .options() comes to. need: {resource: amount}; strategy: ('DEFAULT',), ('SPREAD',), ('node', id, soft) or ('group', id, bundle)
_Plan = collections.namedtuple('_Plan', 'num_returns need strategy env retries retry_exceptions')
# What a client submits. kind: task, create (an actor) or call (of an actor's method); blob: packed arguments, None: in the first of
# deps; deps: ids of the refs at their top level; contained: of those inside; returns: ids of the results; extra: of an actor's creation
_Spec = collections.namedtuple('_Spec', 'id kind name function method blob deps contained returns plan actor extra')
_Extra = collections.namedtuple('_Extra', 'id restarts task_retries max_concurrency name get_if_exists meta')
_Lease = collections.namedtuple('_Lease', 'pool need gpus')  # what a worker holds of a node's, or of a bundle's, resources


class _Resources:
    """What a node, or one bundle of a placement group, has and has free. GPUs are told apart: id -> free share."""
    def __init__(self, total, gpus):
        self.total, self.free, self.gpus = dict(total), dict(total), dict(gpus)

    def copy(self):
        other = _Resources(self.total, self.gpus)
        other.free = dict(self.free)
        return other

    def choose(self, need):
        """The GPU ids it would give. A share of a GPU goes where it leaves the least over."""
        gpus = need.get('GPU', 0)
        fitting = sorted((free, id) for id, free in self.gpus.items() if free >= min(gpus, 1) - 1e-6)
        return [id for _, id in fitting[:math.ceil(gpus)]]

    def fits(self, need):
        enough = all(self.free.get(k, 0) >= amount - 1e-6 for k, amount in need.items())
        return enough and len(self.choose(need)) == math.ceil(need.get('GPU', 0))

    def add(self, need, ids, sign):
        for k, amount in need.items():
            self.free[k] = round(self.free[k] + sign * amount, 6)
        for id in ids:
            self.gpus[id] = round(self.gpus[id] + sign * min(need['GPU'], 1), 6)

    def take(self, need):
        ids = self.choose(need)
        self.add(need, ids, -1)
        return _Lease(self, need, tuple(ids))


@_record
class _Object:
    refs: int = 1            # of all processes, of the objects it is inside of, of tasks that need it
    ready: bool = False
    error: bool = False      # the value is an exception
    blob: bytes = None       # the packed value, or
    place: tuple = None      # where in the arena it is: (offset, size)
    contained: tuple = ()    # ids of the refs inside
    waits: dict = dataclasses.field(default_factory=dict)  # the _Waits that look at it, as keys: they keep their order
    actor: object = None     # the _Actor whose handle this is


@_record
class _Wait:
    """Calls then() once when all but `spare` of the objects are ready."""
    left: set
    spare: int
    then: object


@_record
class _Task:
    spec: _Spec
    job: bytes               # the program that it belongs to
    parent: bytes = None     # the task that submitted it
    actor: object = None     # the _Actor of a create or call
    retries: int = 0         # left
    peer: object = None      # the worker that runs it
    queue: object = None     # the scheduler's queue that it waits in
    cancelled: bool = False


@_record
class _Actor:
    handle: _Object
    create: _Task
    extra: _Extra
    restarts: int            # left; -1: without end
    restarted: int = 0
    state: str = 'pending'   # then alive, restarting, dead
    peer: object = None
    error: bytes = None      # why it is dead
    waiting: bool = False    # the first call of the queue waits for an argument
    queue: collections.deque = dataclasses.field(default_factory=collections.deque)  # calls that have not left yet
    inflight: dict = dataclasses.field(default_factory=dict)                         # calls that its process has


@_record
class _Group:
    bundles: list
    strategy: str
    job: bytes
    ready: bytes             # the object that is there once every bundle has its place
    value: bytes             # and its value
    places: list             # of each bundle: the node, its lease of the node's resources, its own resources


@_record
class _Node:
    id: str
    host: str
    resources: _Resources
    peer: object = None      # the node's daemon; None: the runtime's own node
    idle: dict = dataclasses.field(default_factory=dict)     # (env, GPU ids): workers
    workers: dict = dataclasses.field(default_factory=dict)  # id: worker


class _Peer:
    """Another process as the runtime sees it: a worker, a program elsewhere, a node. A thread reads it, another writes
    to it, neither with the lock: a process that is slow or stopped holds up nobody else."""
    def __init__(self, role, id, node=None, connection=None):
        self.role, self.id, self.node, self.connection = role, id, node, connection
        self.outbox, self.heard = queue.SimpleQueue(), time.monotonic()
        self.refs = {}         # id of an object: how often this process refers to it
        self.places = set()    # room in the arena that it was given and has not filled yet
        self.waits = {}        # request: the _Wait of a get or wait in progress
        self.known = set()     # functions it has
        self.job, self.key, self.nursery = id, None, None        # key: (env, GPU ids) of a worker
        self.task, self.actor, self.lease, self.blocked = None, None, None, 0
        self.dead, self.reason = False, None                     # reason: why it was ended on purpose
        self.ended, self.why = threading.Event(), 'the connection closed'  # said by the zygote

    def send(self, *message):
        self.outbox.put(message)

    def write(self):
        with contextlib.suppress(OSError):  # it is gone: the reading thread says so
            while not self.dead:
                messages = [self.outbox.get()]
                while not self.outbox.empty():
                    messages.append(self.outbox.get())
                _send(self.connection, messages)

    def serve(self, runtime):
        """Until the connection ends."""
        threading.Thread(target=self.write, name='actors-writer', daemon=True).start()
        try:
            while True:
                messages = _receive(self.connection)
                self.heard = time.monotonic()
                for message in messages:
                    runtime.handle(self, message)
        except (EOFError, ConnectionError):
            if self.role == 'worker':
                self.ended.wait(1)  # for the zygote's word on how it ended
        except Exception as e:  # oversized or garbled: this connection ends, nothing else does
            print(f'actors: dropped {self.role} {self.id.hex()}: {type(e).__name__}: {e}', file=sys.stderr)
        runtime.lost(self, self.why)


# ---- the directory: objects ----------------------------------------------------------------------------------
class _Directory:
    """Every object: where its value is, who refers to it, who waits for it."""
    def __init__(self, capacity):
        self.arena = _Arena(capacity)
        self.space = _Free(self.arena.capacity)
        self.objects = {}
        self.later = collections.deque()  # what became possible; called by settle(), so that a chain of ten thousand
        self.unheld = None                # objects is not as many stack frames. unheld(actor): its last handle is gone

    def add(self, oid, **known):
        self.objects[oid] = _Object(**known)
        return self.objects[oid]

    def refer(self, oid, change):
        obj = self.objects.get(oid)
        if obj:
            obj.refs += change
            if obj.refs <= 0 and obj.ready:
                self.later.append(functools.partial(self.free, oid))

    def free(self, oid):
        obj = self.objects.get(oid)
        if obj is None or obj.refs > 0:
            return
        if obj.actor and obj.actor.state != 'dead':
            self.unheld(obj.actor)
            return
        del self.objects[oid]
        if obj.place:
            self.space.give(*obj.place)
        for inner in obj.contained:
            self.refer(inner, -1)

    def allocate(self, size):
        at = self.space.take(size)
        if at is None:
            used, all = self.space.used / 1e6, self.space.capacity / 1e6
            raise ObjectStoreFullError(f'no room for {size / 1e6:.1f} MB: {used:.1f} of {all:.1f} MB hold objects that '
                                       'refs keep; drop refs, or init(object_store_memory=...) with more')
        return at, size

    def fulfil(self, oid, blob=None, place=None, contained=(), error=False):
        obj = self.objects.get(oid)
        if obj is None or obj.ready:  # a late result that nobody waits for
            if place:
                self.space.give(*place)
            return
        obj.ready, obj.error, obj.contained = True, error, contained
        obj.blob, obj.place = blob, place
        for inner in contained:
            self.refer(inner, 1)
        for wait in list(obj.waits):
            wait.left.discard(oid)
            if len(wait.left) <= wait.spare:
                self.unwatch(wait)
                self.later.append(wait.then)
        obj.waits.clear()
        self.refer(oid, 0)  # its last ref may have gone meanwhile

    def watch(self, oids, spare, then):
        """None if all but `spare` are ready, else the _Wait that will call then()."""
        for oid in oids:
            if oid not in self.objects:
                raise ObjectLostError(f'object {oid.hex()} is not known here: freed, or of an earlier session')
        left = {oid for oid in oids if not self.objects[oid].ready}
        if len(left) <= spare:
            return None
        wait = _Wait(left, spare, then)
        for oid in left:
            self.objects[oid].waits[wait] = None
        return wait

    def unwatch(self, wait):
        for oid in wait.left:
            if oid in self.objects:
                self.objects[oid].waits.pop(wait, None)

    def value(self, oid, shared):
        """(id, is it an error, blob, place): one of the last two is None. shared: for a process that has the arena."""
        obj = self.objects[oid]
        if obj.place and not shared:
            return oid, obj.error, bytes(self.arena.view(obj.place)), None
        return oid, obj.error, obj.blob, obj.place


# ---- the scheduler: resources --------------------------------------------------------------------------------
class _Scheduler:
    """Which task starts where. One queue for each (needs, strategy): the first that does not fit stops only its own kind."""
    def __init__(self):
        self.nodes, self.queues, self.groups = {}, {}, {}
        self.changed, self.warned = False, set()

    def add(self, task):
        key = tuple(task.spec.plan.need.items()), task.spec.plan.strategy
        task.queue = self.queues.setdefault(key, collections.deque())
        task.queue.append(task)
        self.changed = True
        if key not in self.warned and key[1][0] != 'group':
            self.warned.add(key)
            self.warn(task.spec)

    def warn(self, spec):
        most = [_Resources(n.resources.total, dict.fromkeys(n.resources.gpus, 1)) for n in self.nodes.values()]
        if not any(resources.fits(spec.plan.need) for resources in most):
            print(f'actors: {spec.name} asks for {spec.plan.need}; no node has that much (all together: '
                  f'{self.sum("total")}). It waits for a node to join.', file=sys.stderr)

    def sum(self, which):
        """All nodes' resources: total or free."""
        amounts = collections.Counter()
        for node in self.nodes.values():
            amounts.update(getattr(node.resources, which))
        return {k: float(round(v, 4)) for k, v in amounts.items() if v > 0}

    def give(self, lease, cpus_lent=False):
        need = {**lease.need, 'CPU': 0} if cpus_lent and 'CPU' in lease.need else lease.need
        lease.pool.add(need, lease.gpus, 1)
        self.changed = True

    def next(self):
        """(task, node, resources to take from) of each task that can start; the caller takes them before the next."""
        for key, queue in list(self.queues.items()):
            while queue and (spot := self.spot(queue[0].spec)):
                task = queue.popleft()
                task.queue = None
                yield task, *spot
            if not queue:
                self.queues.pop(key, None)

    def spot(self, spec):
        """(node, resources) with room for it, (None, an error) if there can never be, None if it has to wait."""
        need, (kind, *where) = spec.plan.need, spec.plan.strategy
        creates = spec.kind == 'create'
        if kind == 'group':
            group = self.groups.get(where[0])
            if group is None:
                error = ActorPlacementGroupRemoved if creates else TaskPlacementGroupRemoved
                return None, error(f'{spec.name}: its placement group was removed')
            places = group.places if where[1] < 0 else [group.places[where[1]]]
            fitting = [(place[0], place[2]) for place in places if place and place[2].fits(need)]
            return fitting[0] if fitting else None
        nodes = list(self.nodes.values())
        if kind == 'node':
            mine = self.nodes.get(where[0])
            if mine and mine.resources.fits(need):
                return mine, mine.resources
            if not where[1] and mine:
                return None
            if not where[1]:
                error = ActorUnschedulableError if creates else TaskUnschedulableError
                return None, error(f'{spec.name}: node {where[0]} is gone and soft=False')
        if kind == 'SPREAD':
            nodes.sort(key=lambda node: len(node.workers) - sum(map(len, node.idle.values())))
        for node in nodes:
            if node.resources.fits(need):
                return node, node.resources
        return None

    # -- placement groups
    def place_groups(self):
        """All missing bundles of a group or none -> the groups that are complete now."""
        complete = []
        for group in self.groups.values():
            plan = self.plan(group) if None in group.places else None
            for i, node in (plan or {}).items():
                lease = node.resources.take(group.bundles[i])
                gpus = {id: min(lease.need['GPU'], 1) for id in lease.gpus}
                group.places[i] = node, lease, _Resources(lease.need, gpus)
            if plan:
                self.changed = True
                complete.append(group)
        return complete

    def plan(self, group):
        """{missing bundle: node}, tried on copies of the resources; None: it has to wait. Big bundles first: greedy, so
        a STRICT_SPREAD over very unequal nodes may wait without need."""
        missing = [i for i, place in enumerate(group.places) if place is None]
        missing.sort(key=lambda i: -sum(group.bundles[i].values()))
        nodes = list(self.nodes.values())
        choices = [[node] for node in nodes] if 'PACK' in group.strategy else []  # on one node, if that can be
        if group.strategy != 'STRICT_PACK':
            choices.append(nodes)
        plans = (self.fit(group, missing, choice) for choice in choices)
        return next(filter(None, plans), None)

    def fit(self, group, missing, nodes):
        """Each bundle on the fullest node that fits; PACK prefers nodes in use, SPREAD unused ones."""
        trial = {node: node.resources.copy() for node in nodes}
        used, plan = {place[0] for place in group.places if place}, {}
        packs = group.strategy == 'PACK'
        for i in missing:
            fitting = [node for node in nodes if trial[node].fits(group.bundles[i])]
            if group.strategy == 'STRICT_SPREAD':
                fitting = [node for node in fitting if node not in used]
            if not fitting:
                return None
            plan[i] = min(fitting, key=lambda node: ((node in used) != packs, sum(trial[node].free.values())))
            trial[plan[i]].take(group.bundles[i])
            used.add(plan[i])
        return plan


# ---- the runtime: tasks, actors, workers ---------------------------------------------------------------------
_LATER = object()  # the answer comes when it is there


class _Desk:
    """Where messages arrive: all state, one lock. on_<operation>(peer, request, ...) runs under it, for the driver in
    its own thread, for the others in the threads that read them; what it returns is the answer. Here: what is asked
    about objects."""
    def __init__(self, resources, gpus, capacity):
        self.lock, self.closed = threading.RLock(), False
        self.directory, self.scheduler = _Directory(capacity), _Scheduler()
        self.inner = None  # the session of the driver that this is a thread of
        self.home = _Node(secrets.token_hex(16), '127.0.0.1', _Resources(resources, gpus))
        self.scheduler.nodes[self.home.id] = self.home

    def handle(self, peer, message):
        operation, request, *args = message
        with self.lock:
            if self.closed or peer.dead:
                return
            self.drain()
            try:
                answer = getattr(self, 'on_' + operation)(peer, request, *args)
            except (RayError, ValueError) as e:
                if not request:
                    raise
                answer = e
            if request and answer is not _LATER:
                peer.send('reply', request, answer)
            self.settle()

    def drain(self):
        """The refs that came and went in the driver since last asked. They may be all the room there is."""
        if self.inner and self.inner.events:
            self.on_refs(self.inner.peer, 0, self.inner.pending_events())
            self.settle()

    def settle(self):
        """What the last message made possible."""
        later = self.directory.later
        while later or self.scheduler.changed:
            if later:
                later.popleft()()
                continue
            self.scheduler.changed = False
            for group in self.scheduler.place_groups():
                self.directory.fulfil(group.ready, group.value)
            for task, node, resources in self.scheduler.next():
                if node:
                    self.start(task, node, resources)
                else:
                    self.fail(task, _pack_error(resources))

    # -- objects
    def refer(self, peer, oid, change):
        """Counted for the process too: when it dies, its refs go."""
        count = peer.refs.pop(oid, 0) + change
        if count:
            peer.refs[oid] = count
        self.directory.refer(oid, change)

    def add(self, peer, oid, **known):
        """A new object, with one ref: the process's that asked."""
        peer.refs[oid] = 1
        return self.directory.add(oid, **known)

    def on_refs(self, peer, _, events):
        for oid, change in events:
            self.refer(peer, oid, change)

    def on_room(self, peer, _, size, blob=None):
        """A place in the arena; a process that has no part in it sends the bytes along."""
        place = self.directory.allocate(size)
        if blob:
            self.directory.arena.room(place)[:] = blob
        peer.places.add(place)
        return place

    def on_put(self, peer, _, oid, blob, place, contained):
        self.add(peer, oid)
        peer.places.discard(place)
        self.directory.fulfil(oid, blob, place, contained)

    def answer_when(self, peer, request, oids, spare, answer):
        def then():
            if peer.waits.pop(request, None):  # else it waits no longer
                self.block(peer, -1)
                peer.send('reply', request, answer())
        wait = self.directory.watch(oids, spare, then)
        if wait is None:
            return answer()
        peer.waits[request] = wait
        self.block(peer, 1)
        return _LATER

    def on_get(self, peer, request, oids):
        shared = peer.node is self.home
        return self.answer_when(peer, request, oids, 0, lambda: [self.directory.value(oid, shared) for oid in oids])

    def on_wait(self, peer, request, oids, count):
        objects = self.directory.objects
        return self.answer_when(peer, request, oids, len(oids) - count, lambda: [objects[oid].ready for oid in oids])

    def on_drop(self, peer, _, request):
        wait = peer.waits.pop(request, None)
        if wait:
            self.directory.unwatch(wait)
            self.block(peer, -1)

    def block(self, peer, change):
        """A worker that waits lends its CPUs, or nested tasks would wait for each other for ever. Taken back even if
        that overdraws."""
        before, peer.blocked = peer.blocked, peer.blocked + change
        if peer.lease and bool(before) != bool(peer.blocked) and 'CPU' in peer.lease.need:
            peer.lease.pool.free['CPU'] += change * peer.lease.need['CPU']
            self.scheduler.changed = True

    def on_info(self, peer, _, what):
        if what == 'nodes':
            return [{'NodeID': node.id, 'Alive': True, 'NodeManagerAddress': node.host,
                     'NodeManagerHostname': node.host, 'Resources': dict(node.resources.total)}
                    for node in self.scheduler.nodes.values()]
        space, amounts = self.directory.space, self.scheduler.sum(what)
        amounts['object_store_memory'] = float(space.capacity - (space.used if what == 'free' else 0))
        return amounts


class _Runtime(_Desk):
    """The life of tasks, actors and workers."""
    def __init__(self, *machine):
        super().__init__(*machine)
        self.directory.unheld = self.out_of_scope
        self.tasks, self.names, self.functions, self.peers = {}, {}, {}, {}
        self.nursery = _Nursery(self.directory.arena, self.exited)
        threading.Thread(target=self.tick, name='actors-clock', daemon=True).start()

    # -- tasks
    def on_export(self, peer, _, fid, blob, contained):
        if fid not in self.functions:
            self.functions[fid] = blob
            for oid in contained:
                self.directory.refer(oid, 1)

    def admit(self, peer, spec):
        parent = peer.task and peer.task.spec.id
        task = self.tasks[spec.id] = _Task(spec, peer.job, parent, retries=spec.plan.retries)
        for oid in (*spec.deps, *spec.contained):
            self.directory.refer(oid, 1)
        for oid in spec.returns:
            self.add(peer, oid)
        return task

    def on_submit(self, peer, _, spec):
        task = self.admit(peer, spec)
        if spec.kind == 'task':
            self.enqueue(task)
            return
        handle = self.directory.objects.get(spec.actor)
        actor = task.actor = handle and handle.actor
        if actor is None:
            error = ActorDiedError(f'{spec.name}: the actor is not known here; of an earlier session?')
            self.fail(task, _pack_error(error))
        elif actor.state == 'dead':
            self.fail(task, actor.error)
        else:
            task.retries = actor.extra.task_retries
            actor.queue.append(task)
            self.pump(actor)

    def failed_argument(self, task):
        """Whether an argument's value is an error; then the task ends with it."""
        for oid in task.spec.deps:
            if self.directory.objects[oid].error and task.spec.kind == 'create':
                self.bury(task.actor, 'an argument of its constructor could not be computed')
                return True
            if self.directory.objects[oid].error:
                self.fail(task, self.directory.objects[oid].blob)
                return True
        return False

    def enqueue(self, task):
        """To the scheduler, once its arguments exist."""
        if task.spec.id not in self.tasks or self.directory.watch(task.spec.deps, 0, lambda: self.enqueue(task)):
            return
        if not self.failed_argument(task):
            self.scheduler.add(task)

    def start(self, task, node, resources):
        lease = resources.take(task.spec.plan.need)
        key = task.spec.plan.env, lease.gpus
        peer = node.idle[key].pop() if node.idle.get(key) else self.spawn(node, key)
        peer.task, peer.lease, peer.job = task, lease, task.job
        if task.actor:
            task.actor.peer, peer.actor = peer, task.actor
        self.run_on(task, peer)

    def run_on(self, task, peer):
        task.peer, spec = peer, task.spec
        shared = peer.node is self.home
        values = [self.directory.value(oid, shared) for oid in spec.deps]
        code = None if spec.function in peer.known else self.functions.get(spec.function)
        peer.known.add(spec.function)
        restarted = task.actor is not None and task.actor.restarted > 0
        peer.send('run', spec, code, values, restarted)

    def pump(self, actor):
        """Calls leave in the order they came; the first whose arguments are not there yet holds up the rest."""
        def again():
            actor.waiting = False
            self.pump(actor)
        while actor.queue and actor.state == 'alive' and not actor.waiting:
            task = actor.queue[0]
            if self.directory.watch(task.spec.deps, 0, again):
                actor.waiting = True
                return
            actor.queue.popleft()
            if not self.failed_argument(task):
                actor.inflight[task.spec.id] = task
                self.run_on(task, actor.peer)

    def on_done(self, peer, _, tid, results):
        task = self.tasks.get(tid)
        returns = task.spec.returns if task and task.peer is peer else [None] * len(results)  # None: cancelled meanwhile
        for oid, (blob, place, contained) in zip(returns, results):
            peer.places.discard(place)
            self.directory.fulfil(oid, blob, place, contained)
        if task is None or task.peer is not peer:
            return
        self.finish(task)
        if task.spec.kind == 'task':
            self.release(peer)
            return
        actor = task.actor
        if task.spec.kind == 'create':
            peer.task, actor.state = None, 'alive'
            self.pump(actor)
        self.out_of_scope(actor)

    def on_fail(self, peer, _, tid, retry, blob):
        task = self.tasks.get(tid)
        if task is None or task.peer is not peer:
            return
        if retry and task.retries and task.spec.kind == 'task' and not task.cancelled:
            self.again(task)
        else:
            self.fail(task, blob)
        if task.spec.kind == 'task':
            self.release(peer)

    def again(self, task):
        task.retries, task.peer = task.retries - 1, None
        self.enqueue(task)

    def fail(self, task, blob):
        if task.spec.kind == 'create' and task.actor.state != 'dead':
            self.bury(task.actor, blob)
            return
        for oid in task.spec.returns:
            self.directory.fulfil(oid, blob, error=True)
        self.finish(task)

    def finish(self, task):
        """The task is over: what it held goes. An actor's creation keeps its arguments as long as it may be repeated."""
        if task.spec.kind == 'call' and task.actor:
            task.actor.inflight.pop(task.spec.id, None)
        if task.spec.kind == 'create' and task.actor.state != 'dead':
            return
        if self.tasks.pop(task.spec.id, None):
            for oid in (*task.spec.deps, *task.spec.contained):
                self.directory.refer(oid, -1)

    def on_cancel(self, peer, _, tid, force, recursive):
        """What waits is dropped. The process of a task that runs is killed; an actor's call that runs goes on."""
        task = self.tasks.get(tid)
        if task is None:
            return
        if task.spec.kind == 'call' and force:
            raise ValueError('force=True is not supported for actor tasks: use actors.kill')
        task.cancelled = True
        if recursive:
            for child in [t.spec.id for t in self.tasks.values() if t.parent == tid]:
                self.on_cancel(peer, 0, child, False, True)
        if task.peer is None:
            self.withdraw(task)
            error = TaskCancelledError(f'{task.spec.name} was cancelled before it ran')
            self.fail(task, _pack_error(error))
        elif task.spec.kind == 'task':
            self.slay(task.peer, None)
        else:
            task.peer.send('cancel', tid)  # it may still be in the worker's queue

    def withdraw(self, task):
        if task.queue and task in task.queue:
            task.queue.remove(task)
        if task.actor and task in task.actor.queue:
            task.actor.queue.remove(task)

    # -- actors
    def on_create(self, peer, request, spec):
        extra = spec.extra
        if extra.name in self.names:
            if extra.get_if_exists:
                return self.on_get_actor(peer, request, extra.name)
            raise ActorAlreadyExistsError(f'the name {extra.name!r} is taken: use get_actor({extra.name!r}), '
                                          'or get_if_exists=True')
        handle = self.add(peer, extra.id, ready=True)
        task = self.admit(peer, spec)
        handle.actor = task.actor = _Actor(handle, task, extra, extra.restarts)
        if extra.name:
            self.names[extra.name] = task.actor
        self.enqueue(task)
        return extra.id, extra.meta

    def on_get_actor(self, peer, _, name):
        actor = self.names.get(name)
        if actor is None:
            raise ValueError(f'Failed to look up actor with name {name!r}: never created, or dead')
        self.refer(peer, actor.extra.id, 1)
        return actor.extra.id, actor.extra.meta

    def on_kill(self, peer, _, aid, no_restart):
        actor = self.directory.objects[aid].actor  # there: its handle is what kill() was given
        self.end_actor(actor, 'it was killed by actors.kill' if no_restart else None)

    def end_actor(self, actor, reason):
        """reason None: as if it had crashed."""
        if actor.peer:
            self.slay(actor.peer, reason)
        elif actor.state != 'dead' and reason:
            self.bury(actor, reason)

    def actor_down(self, actor, peer, why):
        if actor.peer is not peer or actor.state == 'dead':
            return
        actor.peer = None
        if peer.reason or not actor.restarts:
            self.bury(actor, peer.reason or why)
            return
        actor.restarts, actor.restarted, actor.state = actor.restarts - 1, actor.restarted + 1, 'restarting'
        calls, actor.inflight = list(actor.inflight.values()), {}
        self.again(actor.create)
        for task in reversed(calls):
            if task.retries and not task.cancelled:
                task.retries, task.peer = task.retries - 1, None
                actor.queue.appendleft(task)
            else:
                error = ActorUnavailableError(f'{task.spec.name}: the actor died in this call ({why}) and is '
                                              'restarting; the call may or may not have run')
                self.fail(task, _pack_error(error))

    def bury(self, actor, why):
        """why: an error's blob, or words."""
        if isinstance(why, str):
            name = actor.create.spec.name.removesuffix('.__init__')
            why = _pack_error(ActorDiedError(f'{name}: the actor is dead: {why}'))
        actor.state, actor.error = 'dead', why
        if self.names.get(actor.extra.name) is actor:
            del self.names[actor.extra.name]
        for task in [*actor.inflight.values(), *actor.queue]:
            self.fail(task, why)
        actor.queue.clear()
        self.withdraw(actor.create)
        self.finish(actor.create)
        if actor.peer:
            actor.peer.send('exit', 0)
        self.directory.refer(actor.extra.id, 0)

    def out_of_scope(self, actor):
        """No handle is left anywhere, and nothing is to be done: the actor goes."""
        idle = actor.state == 'alive' and not actor.queue and not actor.inflight
        if idle and actor.handle.refs <= 0:
            actor.peer.reason = 'its last handle went out of scope'
            self.bury(actor, actor.peer.reason)

    def on_leave(self, peer, _):
        peer.reason = 'it called exit_actor()'

    # -- workers
    def spawn(self, node, key):
        env, gpus = dict(key[0]), key[1]
        if gpus:
            env['CUDA_VISIBLE_DEVICES'] = ','.join(gpus)
        peer = _Peer('worker', secrets.token_bytes(8), node)
        peer.key = key
        self.peers[peer.id] = node.workers[peer.id] = peer
        if node.peer:
            node.peer.send('spawn', 0, peer.id, env)
            return peer
        if self.nursery.gone:
            self.nursery = _Nursery(self.directory.arena, self.exited)
        peer.nursery = self.nursery
        ours, theirs = socket.socketpair()
        peer.connection = Connection(ours.detach())
        threading.Thread(target=peer.serve, args=(self,), name='actors-reader', daemon=True).start()
        self.nursery.spawn(peer.id, node.id, env, theirs)
        return peer

    def release(self, peer):
        """A task's worker is free: for the next task of its kind, or, if more wait idle than there are CPUs, to go home.
        One that had a GPU goes in any case, and only then is the GPU free: a process that lives may hold its memory."""
        peer.task, idle = None, peer.node.idle
        if peer.lease.gpus:
            peer.send('exit', 0)
            return
        self.scheduler.give(peer.lease, peer.blocked)
        peer.lease = None
        if sum(map(len, idle.values())) > max(2, peer.node.resources.total.get('CPU', 0)):
            peer.send('exit', 0)
        else:
            idle.setdefault(peer.key, []).append(peer)

    def exited(self, wid, why):
        """The zygote's word on a worker; wid None: the zygote itself is gone, and `why` is it."""
        with self.lock:
            if wid is None:
                gone = [peer for peer in self.peers.values() if peer.nursery is why]
                why = 'the zygote died'
            else:
                gone = [self.peers[wid]] if wid in self.peers else []
        for peer in gone:
            peer.why = why
            peer.ended.set()
            if peer.nursery:
                _hang_up(peer.connection)  # its children may hold the other end open; what it said still counts
            elif not peer.connection:      # on another node, before it could say a word
                self.lost(peer, why)

    def slay(self, peer, reason):
        peer.reason = reason
        self.end(peer, 'killed')

    def lost(self, peer, why):
        with self.lock:
            if not self.closed:
                self.end(peer, why)
                self.settle()

    def end(self, peer, why):
        """A process is gone, or is to go. Everything it held, ran or was ends by Ray's rules."""
        if peer.dead:
            return
        peer.dead = True
        peer.send('exit', 0)  # wakes the thread that writes
        if peer.connection:
            _hang_up(peer.connection)
        self.peers.pop(peer.id, None)
        for wait in peer.waits.values():
            self.directory.unwatch(wait)
        for place in peer.places:
            self.directory.space.give(*place)
        for oid, count in peer.refs.items():
            self.directory.refer(oid, -count)
        if peer.lease:
            self.scheduler.give(peer.lease, peer.blocked)
        if peer.role == 'worker':
            self.worker_down(peer, why)
        elif peer.role == 'driver':
            self.job_over(peer.id)
        elif peer.role == 'node':
            self.node_down(peer.node, why)

    def worker_down(self, peer, why):
        peer.node.workers.pop(peer.id, None)
        if peer in peer.node.idle.get(peer.key, ()):
            peer.node.idle[peer.key].remove(peer)
        if peer.nursery:
            peer.nursery.kill(peer.id)
        else:
            peer.node.peer.send('kill', 0, peer.id)
        task, name = peer.task, peer.task and peer.task.spec.name
        if peer.actor:
            self.actor_down(peer.actor, peer, why)
        elif task and task.cancelled:
            self.fail(task, _pack_error(TaskCancelledError(f'{name} was cancelled while it ran')))
        elif task and peer.reason:
            self.fail(task, _pack_error(TaskPlacementGroupRemoved(f'{name}: {peer.reason}')))
        elif task and task.retries:
            self.again(task)
        elif task:
            error = WorkerCrashedError(f'the worker of {name} died ({why}) and no retry is left; max_retries allows more')
            self.fail(task, _pack_error(error))

    def job_over(self, job):
        """A program is gone: its tasks, actors and groups go too."""
        for task in [task for task in self.tasks.values() if task.job == job and task.spec.kind == 'task']:
            self.on_cancel(None, 0, task.spec.id, False, False)
        for obj in list(self.directory.objects.values()):
            if obj.actor and obj.actor.create.job == job:
                self.end_actor(obj.actor, 'its program ended')
        for gid in [gid for gid, group in self.scheduler.groups.items() if group.job == job]:
            self.on_remove_group(None, 0, gid)

    # -- placement groups
    def on_group(self, peer, _, gid, oid, value, bundles, strategy):
        self.add(peer, oid)
        self.scheduler.groups[gid] = _Group(bundles, strategy, peer.job, oid, value, [None] * len(bundles))
        self.scheduler.changed = True

    def on_remove_group(self, peer, _, gid):
        group = self.scheduler.groups.pop(gid, None)
        for node, lease, resources in filter(None, group.places if group else ()):
            for worker in list(node.workers.values()):
                if worker.lease and worker.lease.pool is resources:
                    self.slay(worker, 'its placement group was removed')
            self.scheduler.give(lease)
        if group:
            error = TaskPlacementGroupRemoved('the placement group was removed')
            self.directory.fulfil(group.ready, _pack_error(error), error=True)

    # -- nodes
    def tick(self):
        while not self.closed:
            time.sleep(BEAT)
            with self.lock:
                self.drain()
                nodes = [node for node in self.scheduler.nodes.values() if node.peer]
            for node in nodes:
                node.peer.send('beat', 0)
                if time.monotonic() - node.peer.heard > SILENCE:
                    self.lost(node.peer, f'no sign of life for {SILENCE:.0f} s')

    def on_beat(self, peer, _):
        """Its connection has noted the time."""

    def on_exited(self, peer, _, wid, why):
        self.exited(wid, why)

    def node_down(self, node, why):
        print(f'actors: node {node.id[:8]} ({node.host}) is lost: {why}', file=sys.stderr)
        del self.scheduler.nodes[node.id]
        for group in self.scheduler.groups.values():
            group.places = [place if place and place[0] is not node else None for place in group.places]
        for peer in list(node.workers.values()):
            self.end(peer, 'its node was lost')

    def close(self):
        with self.lock:
            self.closed = True
        self.nursery.close()  # the workers end with it
        os.close(self.directory.arena.fd)


class _Head(_Runtime):
    """The runtime of a cluster: a process of its own, with a port where programs, nodes and their workers knock."""
    def __init__(self, machine, host, port, token):
        self.token, self.port = token, socket.create_server((host, port))
        self.address = '%s:%d' % self.port.getsockname()[:2]
        self.strangers = threading.BoundedSemaphore(STRANGERS)
        super().__init__(*machine)

    def accept(self):
        """Each stranger has a thread and a deadline: a silent one stops nobody."""
        while True:
            sock, _ = self.port.accept()
            if self.strangers.acquire(blocking=False):
                threading.Thread(target=self.greet, args=(sock,), name='actors-greeter', daemon=True).start()
            else:
                sock.close()

    def greet(self, sock):
        try:
            connection = _admit(sock, self.token)
            peer = connection and self.welcome(connection)
        except Exception as e:  # noise, or one of us that speaks out of turn
            print(f'actors: turned a stranger away: {type(e).__name__}: {e}', file=sys.stderr)
            peer = None
        finally:
            sock.close()  # empty by now if it was admitted
            self.strangers.release()
        if peer:
            peer.serve(self)  # this thread reads it from now on

    def welcome(self, connection):
        (operation, request, role, info), = _receive(connection)
        if operation != 'hello':
            raise ConnectionError(f'{operation} before hello')
        with self.lock:
            if role == 'worker':  # its record was made when it was ordered
                peer = self.peers[info['id']]
                peer.connection = connection
                return peer
            peer = self.peers[info['id']] = _Peer(role, info['id'], connection=connection)
            if role == 'node':
                resources = _Resources(info['resources'], info['gpus'])
                peer.node = _Node(info['id'].hex(), info['host'], resources, peer)
                self.scheduler.nodes[peer.node.id] = peer.node
                self.scheduler.changed = True
                self.settle()
            peer.send('reply', request, self.home.id)
        return peer


# ---- sessions: the client's side, of every driver and every worker -------------------------------------------
class _Session:
    """Numbers requests, waits for answers, packs and unpacks values, reports which refs came and went. Subclasses know
    how to reach the runtime: post(operation, request, arguments)."""
    def __init__(self, node, arena):
        self.node, self.arena, self.is_worker = node, arena, False
        self.prefix, self.count = secrets.token_bytes(8), itertools.count(1)
        self.boxes, self.exported, self.error = {}, {}, None  # boxes: request -> where its answer is put
        self.events = collections.deque()  # (id, +1 or -1) of refs that came and went here. __del__ only appends:
                                           # it may run anywhere, under any lock

    def new_id(self):
        return self.prefix + next(self.count).to_bytes(6, 'big')

    def pending_events(self):
        return [self.events.popleft() for _ in range(len(self.events))]

    def call(self, operation, *args, timeout=None):
        request, box = next(self.count), queue.SimpleQueue()
        self.boxes[request] = box
        self.post(operation, request, *args)
        if self.error:
            raise self.error
        try:
            answer = box.get(timeout=timeout)
        except queue.Empty:
            del self.boxes[request]
            self.post('drop', 0, request)
            raise GetTimeoutError(f'{operation}: not there after {timeout} s') from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def answered(self, request, answer):
        box = self.boxes.pop(request, None)
        if box:  # else it waits no longer
            box.put(answer)

    def broken(self, error):
        self.error = error
        for request in list(self.boxes):
            self.answered(request, error)

    def keep(self, packed):
        """Where the value is: (bytes, None), or (None, place) for one above INLINE."""
        if packed.size <= INLINE:
            return packed.join(), None
        if self.arena is None:
            return None, self.call('room', packed.size, packed.join())
        place = self.call('room', packed.size)
        packed.write(self.arena.room(place))
        return None, place

    def put(self, packed):
        oid = self.new_id() + b'\xff\xff'
        self.post('put', 0, oid, *self.keep(packed), packed.contained)
        return ObjectRef(oid, True)

    def load(self, value):
        oid, _, blob, place = value
        try:
            return _unpack(blob if place is None else self.arena.view(place, ObjectRef(oid)))
        except Exception as e:
            raise RaySystemError(f'the value of {oid.hex()} cannot be read here: {type(e).__name__}: {e}') from e

    def get(self, refs, timeout):
        values = []
        for value in self.call('get', [ref._valid_id() for ref in refs], timeout=timeout):
            values.append(self.load(value))
            if value[1]:
                error = values.pop()
                raise error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
        return values

    def wait(self, refs, count, timeout):
        oids = [ref._valid_id() for ref in refs]
        try:
            ready = self.call('wait', oids, count, timeout=timeout)
        except GetTimeoutError:
            ready = self.call('wait', oids, 0)
        done = [ref for ref, ok in zip(refs, ready) if ok][:count]
        chosen = set(done)
        return done, [ref for ref in refs if ref not in chosen]

    def export(self, obj):
        """The id under which workers find a function or class; sent once in a session."""
        if obj not in self.exported:
            packed = _Packed(obj)
            blob = packed.join()
            self.exported[obj] = hashlib.sha256(blob).digest()[:16]
            self.post('export', 0, self.exported[obj], blob, packed.contained)
        return self.exported[obj]

    def spec(self, kind, name, function, method, args, kwargs, plan, actor=None, extra=None):
        """-> _Spec, and a ref that must live until it is sent. Refs at the arguments' top level become dependencies;
        large arguments are put first."""
        deps, kept = [], None
        def swap(value):
            if type(value) is not ObjectRef:
                return value
            deps.append(value._valid_id())
            return _Arg(len(deps) - 1)
        args, kwargs = [swap(v) for v in args], {k: swap(v) for k, v in kwargs.items()}
        try:
            packed = _Packed((args, kwargs))
        except (TypeError, AttributeError, pickle.PicklingError) as e:
            raise TypeError(f'could not serialize the arguments of {name}: {e}') from e
        blob, contained = None, packed.contained
        if packed.size <= INLINE:
            blob = packed.join()
        else:
            kept, contained = self.put(packed), ()
            deps.insert(0, kept._id)
        tid = self.new_id()
        returns = [] if kind == 'create' else [tid + i.to_bytes(2, 'big') for i in range(plan.num_returns)]
        return _Spec(tid, kind, name, function, method, blob, deps, contained, returns, plan, actor, extra), kept

    def submit(self, *args, **kwargs):
        spec, kept = self.spec(*args, **kwargs)
        self.post('submit', 0, spec)
        refs = [ObjectRef(oid, True) for oid in spec.returns]
        del kept
        return refs[0] if len(refs) == 1 else refs or None


class _Direct(_Session):
    """The session of a driver whose runtime is threads of this process: a message is a function call."""
    def __init__(self, runtime):
        super().__init__(runtime.home.id, runtime.directory.arena)
        self.runtime = runtime
        self.peer = _Peer('inner', secrets.token_bytes(8), runtime.home)
        self.peer.send = lambda _, request, answer: self.answered(request, answer)
        runtime.inner = self

    def post(self, *message):
        self.runtime.handle(self.peer, message)

    def close(self):
        self.runtime.close()
        self.broken(RaySystemError('actors.shutdown() was called'))


class _Remote(_Session):
    """A session over a connection: a worker's, a node's, or that of a program which joined a cluster."""
    def __init__(self, connection, node, arena):
        super().__init__(node, arena)
        self.connection, self.sending = connection, threading.Lock()
        threading.Thread(target=self.tell, name='actors-teller', daemon=True).start()

    def post(self, *message):
        with self.sending:
            try:
                _send(self.connection, [('refs', 0, self.pending_events()), message] if self.events else [message])
            except OSError as e:
                self.broken(RaySystemError(f'the head is gone: {e}'))

    def tell(self):
        """Once a second: that this process lives, and the refs that went while nothing else was said."""
        while not self.error:
            time.sleep(BEAT)
            self.post('beat', 0)

    def read(self):
        """Messages that are no answers, until the connection ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                for message in _receive(self.connection):
                    if message[0] == 'reply':
                        self.answered(*message[1:])
                    else:
                        yield message

    def listen(self):
        for _ in self.read():
            continue
        self.broken(RaySystemError('the head is gone: the connection closed'))

    def close(self):
        self.broken(RaySystemError('actors.shutdown() was called'))
        _hang_up(self.connection)


@_record
class _Arg:
    """Stands in the arguments for a dependency."""
    index: int


# ---- workers -------------------------------------------------------------------------------------------------
_Running = collections.namedtuple('_Running', 'task name need actor restarted', defaults=(None, None, {}, None, False))
_current = contextvars.ContextVar('actors_current', default=_Running())  # what get_runtime_context tells


class _Exit(SystemExit):
    """exit_actor()"""


class _Worker:
    """One process that runs tasks one after the other, or is one actor. A thread reads and only sorts; the main thread
    runs user code."""
    def __init__(self, session):
        self.session, self.jobs, self.functions = session, queue.SimpleQueue(), {}
        self.dropped = set()  # cancelled before they began
        self.actor = self.extra = self.pool = None
        threading.Thread(target=self.sort, name='actors-reader', daemon=True).start()

    def sort(self):
        for message in self.session.read():
            if message[0] == 'cancel':
                self.dropped.add(message[2])
            else:
                self.jobs.put(message)
        _leave(1)  # the runtime is gone: nobody wants what is running here

    def serve(self):
        while (message := self.jobs.get())[0] == 'run':
            _, spec, code, values, restarted = message
            if code is not None:
                self.functions[spec.function] = _unpack(code)
            if spec.kind == 'create':
                self.extra = spec.extra
            running = _Running(spec.id, spec.name, spec.plan.need, self.extra, restarted)
            if self.pool and spec.kind == 'call':
                self.pool.submit(self.run, spec, values, running)
            else:
                self.run(spec, values, running)
        if self.pool:
            self.pool.shutdown()
        _leave(0)

    def prepare(self, spec, values):
        """-> the function and its arguments."""
        if spec.id in self.dropped:
            raise TaskCancelledError(f'{spec.name} was cancelled before it ran')
        loaded = [self.session.load(value) for value in values]
        args, kwargs = loaded.pop(0) if spec.blob is None else _unpack(spec.blob)
        args = [loaded[a.index] if type(a) is _Arg else a for a in args]
        kwargs = {k: loaded[a.index] if type(a) is _Arg else a for k, a in kwargs.items()}
        return getattr(self.actor, spec.method) if spec.method else self.functions[spec.function], args, kwargs

    def run(self, spec, values, running):
        _current.set(running)
        try:
            f, args, kwargs = self.prepare(spec, values)
            result = f(*args, **kwargs)
            del args, kwargs  # the refs in them go before the result is told
            if spec.kind == 'create':
                self.become(result, spec.extra)
            self.done(spec, result)
        except _Exit:
            self.session.post('leave', 0)
            _leave(0)
        except BaseException as e:
            self.failed(spec, e)
        self.dropped.discard(spec.id)

    def become(self, actor, extra):
        self.actor = actor
        if extra.max_concurrency > 1:
            import concurrent.futures
            self.pool = concurrent.futures.ThreadPoolExecutor(extra.max_concurrency, 'actors-call')

    def done(self, spec, result):
        count = len(spec.returns)
        results = [result] if count == 1 else list(result) if count else []
        if len(results) != count:
            raise ValueError(f'Task returned {len(results)} objects, but num_returns={count}.')
        packed = [_Packed(value) for value in results]
        told = [(*self.session.keep(p), p.contained) for p in packed]
        self.session.post('done', 0, spec.id, told)

    def failed(self, spec, e):
        retry = spec.plan.retry_exceptions
        if not isinstance(retry, bool):
            retry = isinstance(e, _unpack(retry))
        if isinstance(e, TaskCancelledError) and spec.id in self.dropped:
            self.session.post('fail', 0, spec.id, False, _pack_error(e))
            return
        tb = e.__traceback__
        while tb and tb.tb_frame.f_code.co_filename == __file__:  # the story begins in the user's code
            tb = tb.tb_next
        text = ''.join(traceback.format_exception(type(e), e, tb)).rstrip()
        where = f'(pid={os.getpid()}, node={self.session.node[:8]})'
        cause = e.cause if isinstance(e, RayTaskError) else e
        error = RayTaskError(spec.name, f'{spec.name}() {where}\n{text}', cause)
        if spec.kind == 'create':
            error = ActorDiedError(f'The actor died because of an error raised in its creation task, {error}')
        self.session.post('fail', 0, spec.id, retry, _pack_error(error))


def _family(pid):
    """The processes that pid started or adopted, and theirs. Linux; elsewhere process groups must do."""
    family = []
    for file in glob.glob(f'/proc/{pid}/task/*/children'):
        with contextlib.suppress(OSError), open(file) as f:
            for child in map(int, f.read().split()):
                family += [child, *_family(child)]
    return family


def _end(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _leave(code):
    """A worker ends, with all that it started; what it had in its process group is ended by the zygote."""
    sys.stdout.flush()
    sys.stderr.flush()
    _end(_family(os.getpid()))
    os._exit(code)


class _Nursery:
    """The zygote's parent: orders workers from it, hears of their ends."""
    def __init__(self, arena, exited):
        """exited(worker's id, how it ended); at the end of the zygote itself exited(None, this nursery)."""
        ours, theirs = socket.socketpair()
        self.link, self.exited, self.gone = Connection(ours.detach()), exited, False
        folder, fd = os.path.dirname(os.path.abspath(__file__)), arena.fd if arena else None
        start = f'import sys; sys.path.insert(0, {folder!r}); import actors; '
        start += f'actors._zygote({theirs.fileno()}, {arena.capacity if arena else 0}, {fd})'
        # one thread a library until a worker asks for more: a process that forks must have no threads
        self.process = subprocess.Popen(
            [sys.executable, '-c', start], pass_fds=[theirs.fileno()] + [fd] * bool(arena), start_new_session=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1'})
        theirs.close()
        threading.Thread(target=self.listen, name='actors-nursery', daemon=True).start()

    def spawn(self, wid, node, env, sock=None, address=None, token=None):
        modules = [module for module in PRELOAD if module in sys.modules]
        order = wid, node, env, sys.path, os.getcwd(), modules, address, token
        with contextlib.suppress(OSError):  # it died: listen() says so
            self.link.send(order)
            if sock:
                reduction.send_handle(self.link, sock.fileno(), None)
        if sock:
            sock.close()

    def kill(self, wid):
        with contextlib.suppress(OSError):
            self.link.send((wid,))

    def listen(self):
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.exited(*self.link.recv())
        if not self.gone:
            self.gone = True
            self.exited(None, self)

    def close(self):
        self.gone = True
        _hang_up(self.link)  # it ends its children, and goes
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _zygote(fd, capacity, arena_fd):
    """Forks workers on order. Single-threaded for life: only that makes fork safe. Orders: the arguments of _worker, then
    the worker's socket if it is of this machine; or (id,) to kill one."""
    import gc
    link, workers = Connection(fd), {}  # workers: pid -> id
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of dead workers are children of this process
    heard, wake = os.pipe()
    for end in heard, wake:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while True:
        ready = _wait_for_any([link, heard])
        if heard in ready:
            os.read(heard, 4096)
            _reap(workers, link)
        if link not in ready:
            continue
        try:
            order = link.recv()
            sock = reduction.recv_handle(link) if len(order) > 1 and not order[6] else None
        except (EOFError, OSError):
            _end_all(workers)
        if len(order) == 1:
            for pid in [pid for pid, wid in workers.items() if wid == order[0]]:
                _end([pid, *_family(pid)])
            continue
        for module in order[5]:
            importlib.import_module(module)
        pid = os.fork()
        if not pid:
            try:
                os.setpgrp()  # its children are of its group, and end with it
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in link.fileno(), heard, wake:
                    os.close(end)
                _worker(sock, _Arena(capacity, arena_fd) if arena_fd else None, *order)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        workers[pid] = order[0]
        if sock is not None:
            os.close(sock)


def _reap(workers, link):
    with contextlib.suppress(ChildProcessError, OSError):  # no child is left; the parent is gone
        while pid := (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if pid in workers:  # else an orphan that was adopted
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(ended[1])
                why = f'exit code {code}' if code >= 0 else f'killed by {signal.Signals(-code).name}'
                link.send((workers.pop(pid), why))


def _end_all(workers):
    """The parent is gone. Whoever waits for this process may rely on it: no child is left, adopted ones neither."""
    while True:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        _end([*workers, *_family(os.getpid())])
        try:
            workers.pop(os.waitpid(-1, 0)[0], None)
        except ChildProcessError:
            os._exit(0)


def _worker(fd, arena, wid, node, env, path, cwd, _, address, token):
    global _session
    os.environ.update(env)
    sys.path[:] = path
    sys.stdout.reconfigure(line_buffering=True)
    np.random.seed()  # the fork copied the zygote's generator
    if 'torch' in sys.modules:
        sys.modules['torch'].set_num_threads(int(env.get('OMP_NUM_THREADS', 1)))
    _session = _Remote(_connect(address, token) if address else Connection(fd), node, arena)
    _session.is_worker = True
    if address:
        _session.post('hello', 0, 'worker', {'id': wid})
    _Worker(_session).serve()


# ---- the interface: Ray's --------------------------------------------------------------------------------------
def _ray():
    """The ray module if this process speaks through Ray: after init(backend='ray'), and in Ray's own workers."""
    ray = sys.modules.get('ray')
    initialized = getattr(ray, 'is_initialized', None)
    return ray if _session is None and initialized and initialized() else None


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
    """The ids of this machine's GPUs, counted as a trainer counts them: by torch. A head or node, which has not imported
    it, asks nvidia-smi, and imports torch only where there is an AMD card."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [id for id in visible.split(',') if id.strip() not in ('', '-1')]
    if 'torch' in sys.modules or os.path.exists('/dev/kfd'):
        import torch
        return [str(i) for i in range(torch.cuda.device_count())]
    if not shutil.which('nvidia-smi'):
        return []
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout.splitlines()
    return [str(i) for i in range(sum(line.startswith('GPU') for line in listed))]


def _machine(num_cpus, num_gpus, resources, object_store_memory):
    """-> {resource: amount}, {GPU id: share}, bytes of the arena: 30 % of memory, as in Ray; untouched pages cost nothing."""
    gpus = _count_gpus() if num_gpus != 0 else []
    if num_gpus is not None:
        gpus += [str(i) for i in range(len(gpus), int(num_gpus))]
        gpus = gpus[:int(num_gpus)]
    if num_cpus is None:
        num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    total = {'CPU': num_cpus, 'GPU': len(gpus), **(resources or {})}
    memory = object_store_memory or 0.3 * os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return {k: v for k, v in total.items() if v}, dict.fromkeys(gpus, 1), int(memory)


def init(num_cpus: float = None, num_gpus: int = None, resources: dict = None, object_store_memory: int = None,
         address: str = None, backend: str = 'local', ignore_reinit_error: bool = False, **ray_options):
    """Start here (backend='local'), join a cluster (address='HOST:PORT', token from ACTORS_TOKEN), or do everything on
    Ray (backend='ray'). num_cpus: processes that run at once; object_store_memory: bytes; ray_options go to ray.init.
    RuntimeError if already initialised, ValueError for what this backend does not honour."""
    global _session
    if is_initialized():
        if ignore_reinit_error:
            return
        raise RuntimeError('actors.init() was called already: shutdown() first, or ignore_reinit_error=True')
    given = dict(num_cpus=num_cpus, num_gpus=num_gpus, resources=resources, object_store_memory=object_store_memory)
    given = {k: v for k, v in given.items() if v is not None}
    if backend == 'ray':
        try:
            import ray
        except ImportError:
            raise ValueError("backend='ray' needs Ray: pip install ray") from None
        return ray.init(address=address, **given, **ray_options)
    if backend != 'local':
        raise ValueError(f"backend {backend!r}: expected 'local' or 'ray'")
    if ray_options:
        raise ValueError(f"{', '.join(ray_options)}: only backend='ray' knows that")
    if not address:
        machine = _machine(num_cpus, num_gpus, resources, object_store_memory)
        _session = _Direct(_Runtime(*machine))
    elif given:
        raise ValueError(f"{', '.join(given)}: that is for the head and the nodes to say, not for a program that joins")
    else:
        session = _Remote(_connect(address, _find_token(address)), '', None)
        threading.Thread(target=session.listen, name='actors-reader', daemon=True).start()
        session.node = session.call('hello', 'driver', {'id': session.prefix}, timeout=HANDSHAKE)
        _session = session
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


def is_initialized() -> bool:
    return _session is not None or _ray() is not None


os.register_at_fork(after_in_child=lambda: globals().update(_session=None))  # the user's own fork is not this session


class _RefKind(type):
    def __instancecheck__(cls, obj):
        return type(obj) is cls or isinstance(obj, getattr(sys.modules.get('ray'), 'ObjectRef', ()))


class ObjectRef(metaclass=_RefKind):
    """A promise of a value, counted wherever it goes: when the last one is gone, so is the value."""
    __slots__ = '_id', '_session', '__weakref__'

    def __init__(self, id, counted=False):
        self._id, self._session = id, _session
        if _session is None:
            raise RaySystemError('a ref was received, but actors is not initialised here')
        if not counted:
            _session.events.append((id, 1))

    def __del__(self):
        session = getattr(self, '_session', None)
        if session:
            session.events.append((self._id, -1))

    def _valid_id(self):
        if self._session is not _session:
            raise ValueError(f'{self!r} is of an earlier session')
        return self._id

    def __eq__(self, other):
        return type(other) is ObjectRef and other._id == self._id

    def __hash__(self):
        return hash(self._id)

    def __repr__(self):
        return f'ObjectRef({self._id.hex()})'

    def hex(self) -> str:
        return self._id.hex()

    def binary(self) -> bytes:
        return self._id

    def __reduce__(self):
        raise TypeError('an ObjectRef travels as an argument, as a result or inside put(), where it is counted; plain '
                        'pickle would lose count')

    def __await__(self):
        raise TypeError("`await ref` is Ray's: use actors.get(ref), in a thread if need be, or backend='ray'")


@_or_ray
def get(refs: ObjectRef | list, *, timeout: float = None):
    """The value of a ref, or the list for a list. Raises what the task raised. Arrays are read-only views of shared
    memory. GetTimeoutError after `timeout` seconds. get([put(1), put(2)]) -> [1, 2]"""
    many = refs if isinstance(refs, list) else [refs]
    for ref in many:
        if type(ref) is not ObjectRef:
            error = TypeError if many is refs else ValueError
            raise error(f'get() expected an ObjectRef or a list of them, got {ref!r}')
    values = _here().get(many, timeout)
    return values if many is refs else values[0]


@_or_ray
def put(value) -> ObjectRef:
    """A ref to a copy of value in the object store; 100 MB once, however many actors read it. ObjectStoreFullError."""
    if type(value) is ObjectRef:
        raise TypeError("Calling 'put' on an ObjectRef is not allowed; put it in a list if you mean that")
    return _here().put(_Packed(value))


@_or_ray
def wait(refs: list, *, num_returns: int = 1, timeout: float = None, fetch_local: bool = True):
    """(ready, rest), at most num_returns ready ones, in the order given. Returns when so many are ready, or at the
    timeout (seconds). fetch_local: values lie with the head, so there is nothing to fetch; both are the same."""
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
def kill(actor, *, no_restart: bool = True):
    """SIGKILL to the actor's process and to all that it started. no_restart=False: as if it had crashed."""
    if not isinstance(actor, ActorHandle):
        raise ValueError(f'kill() is for actors, got {type(actor).__name__}; for tasks there is cancel()')
    _here().call('kill', actor._ref._valid_id(), no_restart)


@_or_ray
def cancel(ref: ObjectRef, *, force: bool = False, recursive: bool = True):
    """A task that waits is dropped, the process of one that runs is killed (force or not); get() then raises
    TaskCancelledError. An actor's call is dropped if it has not begun. recursive: the tasks it submitted too."""
    if type(ref) is not ObjectRef:
        raise TypeError(f'cancel() expected an ObjectRef, got {type(ref).__name__}')
    _here().call('cancel', ref._valid_id()[:14], force, recursive)


@_or_ray
def get_actor(name: str, namespace: str = None):
    """The handle of a named actor. ValueError if there is none."""
    if namespace is not None:
        raise ValueError(f"namespace={namespace!r}: namespaces are Ray's, use backend='ray'")
    return _handle(*_here().call('get_actor', name))


@_or_ray
def nodes() -> list:
    return _here().call('info', 'nodes')


@_or_ray
def cluster_resources() -> dict:
    return _here().call('info', 'total')


@_or_ray
def available_resources() -> dict:
    return _here().call('info', 'free')


@_or_ray
def get_gpu_ids() -> list:
    given = os.environ.get('CUDA_VISIBLE_DEVICES', '') if _current.get().need.get('GPU') else ''
    return [id for id in given.split(',') if id]


@_or_ray
def get_runtime_context():
    return _Context()


class _Context:
    """What runs here: ids as hex, None outside of a task."""
    def __init__(self):
        self._session, self._running = _here(), _current.get()
        self.was_current_actor_reconstructed = self._running.restarted

    def get_task_id(self):
        return self._running.task and self._running.task.hex()

    def get_actor_id(self):
        return self._running.actor and self._running.actor.id.hex()

    def get_actor_name(self):
        return self._running.actor and (self._running.actor.name or '')

    def get_node_id(self):
        return self._session.node

    def get_worker_id(self):
        return self._session.prefix.hex()

    def get_assigned_resources(self):
        return dict(self._running.need)

    def get_accelerator_ids(self):
        return {'GPU': get_gpu_ids()}

    @property
    def current_actor(self):
        if not self._running.actor:
            raise RuntimeError('current_actor: this is no actor')
        return _handle(self._running.actor.id, self._running.actor.meta, counted=False)


def _exit_actor():
    """Ends the actor that calls it; no restart."""
    if not _current.get().actor:
        raise TypeError('exit_actor() is for actors, this is no actor')
    raise _Exit(0)


# -- options
_COMMON = {'num_cpus', 'num_gpus', 'resources', 'name', 'scheduling_strategy', 'runtime_env'}
_TASK = _COMMON | {'num_returns', 'max_retries', 'retry_exceptions'}
_ACTOR = _COMMON | {'max_restarts', 'max_task_retries', 'max_concurrency', 'get_if_exists', 'lifetime'}
_RAYS = {'accelerator_type', 'memory', 'max_calls', 'concurrency_groups', 'max_pending_calls', 'namespace',
         'label_selector', 'allow_out_of_order_execution', 'enable_task_events', 'fallback_strategy'}


def _check_options(options, known, what):
    for key, value in options.items():
        if key not in known | _RAYS:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(f'Invalid option keyword {key} for {what}' + (f', did you mean {near[0]}?' if near else ''))
        if key in ('num_cpus', 'num_gpus', 'num_returns') and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f'The quantity of {key} cannot be negative or no number: got {value!r}')


def _plan(options, name, default_cpus):
    """What the options come to here. What only Ray honours is refused by name."""
    env, gpus = options.get('runtime_env') or {}, options.get('num_gpus', 0)
    rays = [f'{key}={options[key]!r}' for key in options if key in _RAYS]
    rays += [f'runtime_env {key!r}' for key in env if key != 'env_vars']
    if options.get('lifetime') is not None:
        rays.append(f"lifetime={options['lifetime']!r}")
    if rays:
        raise ValueError(f"{name}: {', '.join(rays)}: only Ray honours that, use backend='ray'")
    if gpus > 1 and gpus % 1:
        raise ValueError(f'num_gpus {gpus}: a share below 1, or whole GPUs')
    cpus = options.get('num_cpus', default_cpus)
    need = {'CPU': cpus, 'GPU': gpus, **(options.get('resources') or {})}
    need = {k: v for k, v in need.items() if v}
    threads = str(max(1, int(cpus)))  # asked for here, or Ray's rule: as many threads as CPUs
    if 'num_cpus' not in options:
        threads = os.environ.get('OMP_NUM_THREADS', threads)
    env = {'OMP_NUM_THREADS': threads, **env.get('env_vars', {})}
    retry = options.get('retry_exceptions', False)
    if not isinstance(retry, bool):
        retry = _Packed(tuple(retry)).join()
    strategy = _strategy(options.get('scheduling_strategy'), need, name)
    pairs = tuple(sorted((k, str(v)) for k, v in env.items()))
    return _Plan(int(options.get('num_returns', 1)), need, strategy, pairs, options.get('max_retries', 3), retry)


def _strategy(strategy, need, name):
    if strategy in (None, 'DEFAULT', 'SPREAD'):
        return (strategy or 'DEFAULT',)
    if isinstance(strategy, NodeAffinitySchedulingStrategy):
        return 'node', strategy.node_id, strategy.soft
    if not isinstance(strategy, PlacementGroupSchedulingStrategy):
        raise ValueError(f'scheduling_strategy {strategy!r}: expected DEFAULT, SPREAD, '
                         'PlacementGroupSchedulingStrategy or NodeAffinitySchedulingStrategy')
    group, i = strategy.placement_group, strategy.placement_group_bundle_index
    if not -1 <= i < group.bundle_count:
        raise ValueError(f'placement group bundle index {i} is invalid: 0 to {group.bundle_count - 1}, or -1 for any')
    bundles = group.bundle_specs if i < 0 else [group.bundle_specs[i]]
    if not any(all(bundle.get(k, 0) >= v for k, v in need.items()) for bundle in bundles):
        raise ValueError(f'Cannot schedule {name} with the placement group: {need} cannot fit into any bundle of '
                         f'{group.bundle_specs}')
    return 'group', group.id, i


def _signature(f, skip=0):
    """Only the shape: names and kinds; defaults and annotations may be anything, and handles travel."""
    parameters = list(inspect.signature(f).parameters.values())[skip:]
    return inspect.Signature([p.replace(default=p.empty if p.default is p.empty else None, annotation=p.empty)
                              for p in parameters])


def method(**options):
    """@actors.method(num_returns=2) on an actor's method."""
    if set(options) - {'num_returns'}:
        raise ValueError(f'method options {options}: num_returns is the one there is')
    def mark(f):
        f._actors_method = options
        return f
    return mark


def remote(*args, **options):
    """@actors.remote or @actors.remote(num_cpus=2, ...) on a function or a class. Call f.remote(...), Class.remote(...);
    .options(...) overrides."""
    def wrap(target):
        if inspect.isclass(target):
            return ActorClass(target, options)
        if not callable(target):
            raise TypeError('The @actors.remote decorator must be applied to a function or a class')
        if inspect.isgeneratorfunction(target):
            raise TypeError(f'{target.__name__} is a generator: return a list, or let an actor be called repeatedly')
        if inspect.iscoroutinefunction(target):
            raise ValueError(f'{target.__name__} is a coroutine: wrap it in a function that calls asyncio.run')
        return RemoteFunction(target, options)
    return wrap(args[0]) if len(args) == 1 and not options and callable(args[0]) else wrap


class _Remotable:
    """A function or class with options; what both have in common."""
    def __init__(self, target, options):
        _check_options(options, self._known, self._what)
        functools.update_wrapper(self, target, updated=())
        self._target, self._options, self._ready = target, options, (None, None)

    def __getstate__(self):
        return self._target, self._options

    def __setstate__(self, state):
        self.__init__(*state)

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{self._what} cannot be called directly: instead of '{self.__name__}()', "
                        f"try '{self.__name__}.remote()'")

    def options(self, **options):
        return type(self)(self._target, {**self._options, **options})

    def remote(self, *args, **kwargs):
        ray = _ray()
        session = ray or _here()
        if self._ready[0] is not session:
            if ray:
                prepared = self._on_ray(ray)
            else:
                prepared = self._prepare(session)
            self._ready = session, prepared
        prepared = self._ready[1]
        return prepared.remote(*args, **kwargs) if ray else self._submit(session, prepared, args, kwargs)

    def _on_ray(self, ray):
        return ray.remote(**self._options)(self._target) if self._options else ray.remote(self._target)


class RemoteFunction(_Remotable):
    _known, _what = _TASK, 'remote functions'

    def _prepare(self, session):
        return _signature(self._target), session.export(self._target), _plan(self._options, self.__name__, 1)

    def _submit(self, session, prepared, args, kwargs):
        signature, function, plan = prepared
        signature.bind(*args, **kwargs)  # TypeError says what is wrong
        name = self._options.get('name') or self.__qualname__
        return session.submit('task', name, function, None, args, kwargs, plan)


class ActorClass(_Remotable):
    _known, _what = _ACTOR, 'actors'

    def _methods(self):
        routines = inspect.getmembers(self._target, inspect.isroutine)
        return {name: m for name, m in routines if not name.startswith('__') or name == '__call__'}

    def _on_ray(self, ray):
        for m in self._methods().values():
            if hasattr(m, '_actors_method'):
                ray.method(**m._actors_method)(m)
        return super()._on_ray(ray)

    def _prepare(self, session):
        shapes = {}
        for name, m in self._methods().items():
            if inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m):
                raise ValueError(f"{self.__name__}.{name} is a coroutine: coroutine methods are Ray's (backend='ray'); "
                                 'here a plain method, with max_concurrency=n for n at once')
            bound = isinstance(inspect.getattr_static(self._target, name), (staticmethod, classmethod))
            try:
                signature = _signature(m, 0 if bound else 1)
            except ValueError:  # a C function without a signature: any arguments
                signature = inspect.signature(lambda *args: None)
            shapes[name] = signature, getattr(m, '_actors_method', {}).get('num_returns', 1)
        init = self._target.__init__
        signature = inspect.Signature() if init is object.__init__ else _signature(init, 1)
        plan = _plan(self._options, self.__name__, 0)
        return signature, session.export(self._target), plan, pickle.dumps((self.__name__, shapes), 5)

    def _submit(self, session, prepared, args, kwargs):
        signature, function, plan, meta = prepared
        signature.bind(*args, **kwargs)
        get = self._options.get
        extra = _Extra(session.new_id() + b'\xfe\xff', get('max_restarts', 0), get('max_task_retries', 0),
                       get('max_concurrency') or 1, get('name'), get('get_if_exists', False), meta)
        name = f'{self.__name__}.__init__'
        spec, kept = session.spec('create', name, function, None, args, kwargs, plan, extra.id, extra)
        handle = _handle(*session.call('create', spec))
        del kept
        return handle


class ActorMethod:
    def __init__(self, handle, name, signature, plan):
        self._handle, self._name, self._signature, self._plan = handle, name, signature, plan

    def __call__(self, *args, **kwargs):
        raise TypeError(f"Actor methods cannot be called directly: instead of '{self._name}()', try "
                        f"'{self._name}.remote()'")

    def options(self, **options):
        _check_options(options, {'num_returns'}, 'actor methods')
        return ActorMethod(self._handle, self._name, self._signature, self._plan._replace(**options))

    def remote(self, *args, **kwargs):
        self._signature.bind(*args, **kwargs)
        handle, name = self._handle, f'{self._handle._class_name}.{self._name}'
        return _here().submit('call', name, None, self._name, args, kwargs, self._plan, handle._ref._valid_id())


class ActorHandle:
    """Calls of one process run in the order they were made (max_concurrency=1). The last handle gone, the actor ends."""
    def __init__(self, ref, meta):
        self._ref, self._meta = ref, meta
        self._class_name, self._methods = pickle.loads(meta)

    def __getattr__(self, name):
        methods = self.__dict__.get('_methods', {})
        if name not in methods:
            raise AttributeError(f"actor {self.__dict__.get('_class_name')} has no method {name!r}")
        signature, num_returns = methods[name]
        return ActorMethod(self, name, signature, _Plan(num_returns, {}, ('DEFAULT',), (), 0, False))

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
    def __init__(self, id, bundles, ref):
        self.id, self.bundle_specs, self.bundle_count, self._ref = id, bundles, len(bundles), ref

    def ready(self) -> ObjectRef:
        return self._ref

    def wait(self, timeout_seconds: float = 30) -> bool:
        return bool(wait([self._ref], timeout=timeout_seconds)[0])


def placement_group(bundles: list, strategy: str = 'PACK', name: str = '', lifetime: str = None) -> PlacementGroup:
    """Reserve bundles ([{'CPU': 2, 'GPU': 1}, ...]) all or none. PACK: on few nodes, SPREAD: on many, STRICT_: insist.
    Returns at once."""
    if name or lifetime:
        raise ValueError(f"name={name!r}, lifetime={lifetime!r}: only Ray honours that, use backend='ray'")
    if not isinstance(bundles, list) or not bundles or not all(isinstance(bundle, dict) for bundle in bundles):
        raise ValueError(f'bundles must be a non-empty list of resource dictionaries such as [{{"CPU": 1}}], got {bundles!r}')
    bundles = [{k: v for k, v in bundle.items() if v} for bundle in bundles]
    if not all(bundles) or any(v < 0 for bundle in bundles for v in bundle.values()):
        raise ValueError(f'a bundle asks for something, and for no negative amount: got {bundles}')
    if strategy not in ('PACK', 'SPREAD', 'STRICT_PACK', 'STRICT_SPREAD'):
        raise ValueError(f'placement group strategy {strategy!r}: expected PACK, SPREAD, STRICT_PACK or STRICT_SPREAD')
    session = _here()
    oid = session.new_id() + b'\xff\xff'
    group = PlacementGroup(session.new_id(), bundles, ObjectRef(oid, True))
    session.call('group', group.id, oid, _Packed(group).join(), bundles, strategy)
    return group


def remove_placement_group(group: PlacementGroup):
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
    """Hands values to whichever actor is free: pool.map(lambda actor, value: actor.work.remote(value), values). An actor
    that died leaves the pool."""
    def __init__(self, actors):
        self._idle, self._busy, self._waiting = list(actors), {}, collections.deque()
        self._sent = self._next = 0  # _busy: ref -> its number, actor

    def submit(self, fn, value):
        if self._idle:
            actor = self._idle.pop()
            self._busy[fn(actor, value)] = self._sent, actor
            self._sent += 1
        else:
            self._waiting.append((fn, value))

    def has_next(self) -> bool:
        return bool(self._busy or self._waiting)

    def has_free(self) -> bool:
        return bool(self._idle) and not self._waiting

    def push(self, actor):
        self._idle.append(actor)
        if self._waiting:
            self.submit(*self._waiting.popleft())

    def pop_idle(self):
        return self._idle.pop() if self.has_free() else None

    def _take(self, refs, timeout):
        """The value of whichever of refs is ready first."""
        if not self.has_next():
            raise StopIteration('No more results to get')
        if not self._busy:
            raise ActorDiedError(f'every actor of the pool is dead, {len(self._waiting)} values wait: push() another')
        ready, _ = wait(refs, timeout=timeout)
        if not ready:
            raise TimeoutError('Timed out waiting for result')
        number, actor = self._busy.pop(ready[0])
        self._next = max(self._next, number + 1)
        try:
            value = get(ready[0])
        except ActorDiedError:
            raise
        except Exception:
            self.push(actor)
            raise
        self.push(actor)
        return value

    def get_next(self, timeout: float = None):
        """The next result in the order of submission. StopIteration when there is none, TimeoutError."""
        due = [ref for ref, (number, _) in self._busy.items() if number == self._next]
        if self._busy and not due:
            raise ValueError('get_next() after get_next_unordered() is not allowed')
        return self._take(due, timeout)

    def get_next_unordered(self, timeout: float = None):
        """Whichever result comes first."""
        return self._take(list(self._busy), timeout)

    def _map(self, fn, values, take):
        for value in values:
            self.submit(fn, value)
        while self.has_next():
            yield take()

    def map(self, fn, values):
        return self._map(fn, values, self.get_next)

    def map_unordered(self, fn, values):
        return self._map(fn, values, self.get_next_unordered)


class _Names(types.ModuleType):
    """actors.util, actors.exceptions ...: our names, or Ray's own while Ray is what runs (look them up after init)."""
    def __init__(self, path, *things, **named):
        super().__init__(f'actors.{path}')
        self._path, self._table = path, {**{thing.__name__: thing for thing in things}, **named}
        sys.modules[self.__name__] = self

    def __getattr__(self, name):
        if name not in self.__dict__.get('_table', ()):
            raise AttributeError(f'{self.__name__} has no {name!r}')
        return getattr(importlib.import_module(f'ray.{self._path}'), name) if _ray() else self._table[name]


exceptions = _Names('exceptions', *[v for v in globals().values() if isinstance(v, type) and issubclass(v, RayError)])
actor = _Names('actor', ActorHandle, ActorClass, exit_actor=_exit_actor)
util = _Names('util', placement_group, remove_placement_group, ActorPool)
util.scheduling_strategies = _Names('util.scheduling_strategies', PlacementGroupSchedulingStrategy,
                                    NodeAffinitySchedulingStrategy)


# ---- a cluster: the head, a node -------------------------------------------------------------------------------
def _serve_head(host, port, machine):
    """The head of a cluster; never returns. Loopback needs no ceremony, any other address a token of the user's own."""
    token = os.environ.get('ACTORS_TOKEN', '')
    if not token and host not in ('127.0.0.1', 'localhost', '::1'):
        raise ValueError(f'--host={host} is open to others: set ACTORS_TOKEN to a secret of 16 characters or more '
                         '(python -c "import secrets; print(secrets.token_hex())")')
    if 0 < len(token) < 16:
        raise ValueError(f'ACTORS_TOKEN has {len(token)} characters: 16 or more')
    made, token = not token, token or secrets.token_hex(16)
    head = _Head(machine, host, port, token)
    file = _token_file(head.address.rpartition(':')[2])
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), 'w') as f:
        os.fchmod(f.fileno(), 0o600)
        f.write(token)
    print(f'actors: head at {head.address}, pid {os.getpid()}' + (f'\ntoken: {token}' if made else ''), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        head.accept()
    finally:
        head.close()
        os.unlink(file)


def _serve_node(address, machine):
    """A node of a cluster: starts and ends workers, says every second that it lives. Ends with its head."""
    token = _find_token(address)
    id, (resources, gpus, _) = secrets.token_bytes(16), machine
    link = _Remote(_connect(address, token), id.hex(), None)
    nursery = _Nursery(None, lambda wid, why: link.post('exited', 0, wid, why) if wid else os.kill(os.getpid(), signal.SIGTERM))
    link.post('hello', 1, 'node', {'id': id, 'resources': resources, 'gpus': gpus, 'host': socket.gethostname()})
    print(f'actors: node {link.node[:8]} of {address}, pid {os.getpid()}, {resources}', flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while link.connection.poll(2 * SILENCE):
            for operation, _, *args in _receive(link.connection):
                if operation == 'spawn':
                    nursery.spawn(args[0], link.node, args[1], address=address, token=token)
                elif operation == 'kill':
                    nursery.kill(args[0])
        raise ConnectionError(f'nothing from the head at {address} for {2 * SILENCE:.0f} s')
    except EOFError:
        raise ConnectionError(f'the head at {address} closed the connection') from None
    finally:
        nursery.close()


if __name__ == '__main__':
    head = False              # --head=True: start a cluster
    host = '127.0.0.1'        # the head's address; another than loopback needs ACTORS_TOKEN
    port = 6399               # the head's port; 0 = any free one
    address = ''              # HOST:PORT of a head: join it as a node
    num_cpus = -1             # resources of this node; -1 = what the machine has
    num_gpus = -1
    object_store_memory = 0   # bytes of the head's arena; 0 = 30 % of memory
    config_keys = [k for k, v in globals().items()
                   if not k.startswith('_') and isinstance(v, (int, float, bool, str)) and k.islower()]
    _status = sys.argv[1:2] == ['status']
    if _status:
        del sys.argv[1]
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import actors  # one identity for every class, here as in the workers
    if _status:
        raise ValueError("status is Ray's (`ray status`); a program asks actors.nodes(), actors.available_resources()")
    if head == bool(address):
        raise ValueError('--head=True starts a cluster, --address=HOST:PORT joins one: one of the two')
    if address and object_store_memory:
        raise ValueError(f"object_store_memory {object_store_memory}: the arena is the head's, a node has none")
    _counts = [None if n < 0 else n for n in (num_cpus, num_gpus)]
    _this_machine = actors._machine(*_counts, None, object_store_memory)
    try:
        if head:
            actors._serve_head(host, port, _this_machine)
        else:
            actors._serve_node(address, _this_machine)
    except (actors.RayError, ConnectionError) as _e:
        raise ValueError(_e) from None
