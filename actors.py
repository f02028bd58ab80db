"""Tasks, actors and a shared object store: Ray's names and rules in one file, on processes of this machine,
on a few machines, or on Ray itself.

    import actors
    actors.init(num_cpus=4)                # init(backend='ray'): the same program, unchanged, on real Ray

    @actors.remote
    def square(x): return x * x
    print(actors.get([square.remote(i) for i in range(4)]))     # [0, 1, 4, 9]

    python actors.py --head=True --port=6399             # a cluster: one head (it prints a token) ...
    python actors.py --address=HOST:6399 --num_cpus=4    # ... nodes (ACTORS_TOKEN as printed),
                                                         # and programs: init(address='HOST:6399')

A call's way, from f.remote(x) to get(ref)

    the program (driver)       the runtime (threads of the driver, or the head)     a worker
    --------------------       ------------------------------------------------     -----------------------
    f.remote(x)
      x -> bytes (_Packed)
      _Session.submit -------> on_submit: a _Task, an _Object for its result
      an ObjectRef             enqueue: do all its arguments exist?
                               _Scheduler: where are CPUs and GPUs free?
                               start: an idle worker, or a new one of the zygote
                               run_on: "run", x -----------------------------------> _Worker.run: f(x)
                                                                                     result -> bytes, if they
                               on_done: the object is there <------- "done" -------- are many into the arena
    get(ref) ----------------> on_get: wait for the object
      bytes -> value <-------- its bytes, or its place in the arena

An actor's method takes the same way through the actor's own queue: its process is chosen once, and its calls
run in the order they were made.

How it works, in the order of this file
1. Values travel as pickle 5: arrays and tensors out of band, functions and classes of the running script by
   value (code + globals + closure).
2. A value above 100 KB is written once into the arena, an anonymous memory file that all processes of the
   machine share, and is read in place. The file has no name, so nothing can be left behind.
3. The directory knows every object: its place, who refers to it, who waits for it. The scheduler knows what
   is free where. The runtime moves tasks and actors between the two. One lock is around all state; whoever
   asks sends (operation, request number, arguments).
4. Workers are forked by the zygote, a small single-threaded process that has imported NumPy (and torch, if
   the driver has) and nothing else: a start costs milliseconds and inherits no thread, lock or CUDA context.
   When the driver dies, its sockets close; the zygote sees that and ends all workers with all they started.
5. Over TCP both sides prove that they know the token (HMAC-SHA256 of fresh nonces) before anything is
   unpickled. After that the peer is trusted and the bytes are not encrypted: a cluster is for one private
   network, or for ssh tunnels. All objects live in the head's arena; a worker elsewhere gets copies.

Left out, and refused by name: generators, coroutine methods and `await ref`, exit_actor, detached actors,
namespaces, runtime_env (but env_vars), spilling to disk. Ray has them all: init(backend='ray').
"""
import atexit
import bisect
import contextvars
import ctypes
import dataclasses
import difflib
import dis
import enum
import functools
import glob
import hmac
import importlib
import inspect
import io
import itertools
import marshal
import math
import mmap
import os
import pathlib
import pickle
import queue
import secrets
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
from collections import Counter, deque, namedtuple
from concurrent import futures
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection

import numpy as np

INLINE = 100 << 10        # bytes; a value above it goes through the arena (Ray's limit)
MAX_FRAME = 1 << 38       # bytes; a frame that announces more ends the connection
BEAT, SILENCE = 1.0, 8.0  # seconds between a node's heartbeats; silence after which it is taken for dead
HANDSHAKE = 10            # seconds that a stranger has to prove itself
START = 60.0              # seconds that a worker on another node has to connect
STRANGERS = 64            # handshakes at once; more are turned away
PRELOAD = ['torch']       # imported once by the zygote if the driver has it: seconds that a worker saves
_session = None           # this process's connection to a runtime; None before init, and under backend='ray'


# ---- errors: Ray's names -----------------------------------------------------------------------------------
class RayError(Exception):
    """Whatever goes wrong here."""


class RayTaskError(RayError):
    """A task or method raised. str() is the remote traceback, .cause the user's exception (None where it
    could not be sent); get() raises it as an instance of the cause's class too."""
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
        space = {'__module__': __name__, '__getattr__': lambda self, name: getattr(vars(self)['cause'], name)}
        try:
            both = type(f'RayTaskError({kind.__name__})', (RayTaskError, kind), space)
            error = both.__new__(both)
        except TypeError:  # a class that cannot be mixed; the plain error still carries it as .cause
            return self
        error.__dict__.update(self.__dict__)
        error.args = self.cause.args
        return error


class TaskCancelledError(RayError):
    """The task was cancelled."""
class WorkerCrashedError(RayError):
    """The process that ran the task died, also in its retries."""
class RayActorError(RayError):
    """Something about an actor."""
class ActorDiedError(RayActorError):
    """The actor is dead and stays dead."""
class ActorUnavailableError(RayActorError):
    """The actor died in the call and is being restarted."""
class GetTimeoutError(RayError, TimeoutError):
    """get() waited as long as it was told to."""
class ObjectLostError(RayError):
    """The object is not there: freed, or of an earlier session."""
class ObjectStoreFullError(RayError):
    """The arena has no room."""
class RaySystemError(RayError):
    """The runtime itself failed, or is gone, or a value cannot be read here."""
class AuthenticationError(ValueError, RayError):
    """The other side of a connection does not know the token."""
class TaskUnschedulableError(RayError):
    """The node that the task insists on is gone."""
class ActorUnschedulableError(RayError):
    """The node that the actor insists on is gone."""
class TaskPlacementGroupRemoved(RayError):
    """The placement group of the task was removed."""
class ActorPlacementGroupRemoved(RayError):
    """The placement group of the actor was removed."""
class ActorAlreadyExistsError(ValueError, RayError):
    """The name is taken."""


def _open_task_error(function_name, text, sealed):
    try:
        return RayTaskError(function_name, text, _unpack(sealed))
    except Exception as e:
        note = f'\n(the exception itself could not be read here: {type(e).__name__}: {e})'
        return RayTaskError(function_name, text + note)


# ---- values to bytes and back ------------------------------------------------------------------------------
@functools.lru_cache(None)
def _findable(package):
    return any(finder.find_spec(package, None) for finder in sys.meta_path)


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
    """The second half of unpickling a function: by now it exists, so that what it refers to may refer to
    it."""
    space, modules, (cells, attributes) = state
    for module in modules:  # `import a.b` binds only a, yet the code says a.b
        importlib.import_module(module)
    f.__globals__.update(space)
    for cell, filled in zip(f.__closure__ or (), cells):
        if filled:
            cell.cell_contents = filled[0]
    for key, value in attributes.items():
        setattr(f, key, value)


# A class that travelled by value keeps one identity in a process: `except MyError` in the script catches what
# a worker raised
_class_keys = weakref.WeakKeyDictionary()  # class: its key
_classes = weakref.WeakValueDictionary()   # key: class
_unfilled = set()                          # keys of classes that were made here and have no attributes yet


def _new_class(key, meta, name, bases, first):
    if key not in _classes:
        made = types.new_class(name, bases, {'metaclass': meta}, lambda space: space.update(first))
        _classes[key], _class_keys[made] = made, key
        _unfilled.add(key)
    return _classes[key]


def _fill_class(cls, state):
    key = _class_keys[cls]
    if key in _unfilled:
        _unfilled.remove(key)
        for name, value in state.items():
            type.__setattr__(cls, name, value)


def _proxy(mapping):
    return types.MappingProxyType(mapping)


def _array(a):
    """Out of band whatever the layout, and read-only at the other end: there it may be memory that others see
    too."""
    if a.dtype.hasobject or not a.size:
        return NotImplemented
    a = (a if a.flags.forc else np.ascontiguousarray(a)).view()
    a.flags.writeable = False
    return a.__reduce_ex__(5)


def _tensor(buffer, dtype, shape, grad):
    import torch
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape).requires_grad_(grad)


def _flat_tensor(t, torch):
    """CPU tensors out of band, a Parameter's too. They come back writable: a write lands in the reader's own
    copy-on-write page."""
    plain = type(t) is torch.Tensor and t.layout == torch.strided and not t.is_quantized
    if not plain or t.device.type != 'cpu' or not t.numel():
        return NotImplemented
    flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(raw), t.dtype, tuple(t.shape), t.requires_grad)


_BY_PARTS = {  # type: how to make it again
    np.ndarray: _array,
    types.ModuleType: lambda m: (importlib.import_module, (m.__name__,)),
    types.MappingProxyType: lambda m: (_proxy, (dict(m),)),
    property: lambda p: (property, (p.fget, p.fset, p.fdel, p.__doc__)),
    classmethod: lambda m: (classmethod, (m.__func__,)),
    staticmethod: lambda m: (staticmethod, (m.__func__,)),
}


class _Pickler(pickle.Pickler):
    """Pickle 5 plus what the standard leaves out: functions and classes by value, arrays and tensors out of
    band; the refs inside are noted in .contained, where the runtime counts them."""
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
        said = {'', *f.__code__.co_names}
        modules = [m for m in [*sys.modules] if m.startswith(prefixes) and said.issuperset(m.split('.')[1:])]
        # functions of one module share their globals there too: one dict, so one entry in the pickler's memo
        shared = self.spaces.setdefault(id(space), {'__name__': space.get('__name__')})
        cells = []
        for cell in f.__closure__ or ():
            try:
                cells.append((cell.cell_contents,))
            except ValueError:  # not bound yet
                cells.append(())
        kept = '__qualname__', '__doc__', '__defaults__', '__kwdefaults__'
        attributes = {name: getattr(f, name) for name in kept} | f.__dict__
        start = marshal.dumps(f.__code__), shared, f.__name__, len(cells)
        return _new_function, start, (used, modules, (cells, attributes)), None, None, _fill_function

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


class _Packed:
    """A value as bytes: head (counts, table, pickle), then the out-of-band buffers, each on a 64-byte
    boundary. .parts: (offset, bytes) of each, .size: of the whole, .contained: the ids of the refs inside,
    .private: it has tensors, which a reader may write to."""
    def __init__(self, value):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        data, raws = file.getvalue(), [buffer.raw() for buffer in pickler.buffers]
        table, self.parts, self.contained = [], [], pickler.contained
        self.private = not all(raw.readonly for raw in raws)
        self.size = 16 + 16 * len(raws) + len(data)
        for raw in raws:
            at = -(-self.size // 64) * 64
            table += at, len(raw)
            self.parts.append((at, raw))
            self.size = at + len(raw)
        head = struct.pack(f'<{2 + len(table)}Q', len(raws), len(data), *table) + data
        self.parts.append((0, head))

    def join(self):
        blob = bytearray(self.size)
        for at, part in self.parts:
            blob[at:at + len(part)] = part
        return bytes(blob)


def _unpack(blob):
    count, size = struct.unpack_from('<2Q', blob)
    if count and isinstance(blob, bytes):
        blob = bytearray(blob)  # a tensor may be written to; an array is read-only by what its pickle says
    view = memoryview(blob)
    table = struct.unpack_from(f'<{2 * count}Q', view, 16)
    start = 16 + 16 * count
    buffers = [view[at:at + n] for at, n in zip(table[::2], table[1::2])]
    return pickle.loads(view[start:start + size], buffers=buffers)


# ---- the store: one file in memory -------------------------------------------------------------------------
class _Free:
    """First fit over one file, in pages. Low addresses first: pages once touched are used again (33 GB/s
    against 1.5 GB/s into fresh ones)."""
    def __init__(self, capacity):
        self.capacity, self.taken = capacity, []  # taken: (start, end), in order

    def take(self, size):
        """-> the offset. ObjectStoreFullError without room."""
        size, start = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, 0
        for i, (at, end) in enumerate([*self.taken, (self.capacity, 0)]):
            if at - start >= size:
                self.taken.insert(i, (start, start + size))
                return start
            start = end
        used = f'{self.used() / 1e6:.1f} of {self.capacity / 1e6:.1f} MB hold objects that refs keep'
        raise ObjectStoreFullError(f'no room for {size / 1e6:.1f} MB: {used}; drop refs, or give '
                                   'init(object_store_memory=...) more')

    def give(self, place):
        """place: (offset, ...); bytes, of an object that is not in the arena, are nothing to give back."""
        if isinstance(place, tuple):
            del self.taken[bisect.bisect(self.taken, place[:1])]

    def used(self):
        return sum(end - start for start, end in self.taken)


class _Private(mmap.mmap):
    """One object mapped copy-on-write. Its tensors keep the map, the map keeps .ref, the ref keeps the
    object."""


class _Shared(np.ndarray):
    """One object in a read-only map of the whole arena, which is made once and stays. It keeps .ref
    likewise."""


class _Arena:
    """This process's maps of the shared file. A place in it is (offset, size, private); who may write where
    is the runtime's business."""
    def __init__(self, capacity, fd=None):
        self.capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd, self.writing, self.reading = fd, None, None
        self.written = 0  # the end of what this process has written to
        if fd is None:
            if hasattr(os, 'memfd_create'):
                self.fd = os.memfd_create('actors-arena')
            else:  # macOS
                with tempfile.TemporaryFile(prefix='actors-') as file:
                    self.fd = os.dup(file.fileno())
            os.ftruncate(self.fd, self.capacity)

    def write(self, place, parts):
        """The first time through the file: pages are neither zeroed nor mapped (2.4 GB/s, 1.3 through the
        map). Later through the map: 2.4 GB/s once, then its pages are there (10 GB/s, 4.7 by the file)."""
        start, size, _ = place
        fresh, self.written = start + size > self.written, max(start + size, self.written)
        self.writing = self.writing or mmap.mmap(self.fd, self.capacity)
        for at, part in parts:
            at += start
            if not fresh:
                self.writing[at:at + len(part)] = part
                continue
            while len(part):
                count = os.pwrite(self.fd, part, at)  # at most 2 GB at once
                part, at = part[count:], at + count

    def view(self, place, ref=None):
        """The bytes of a place, to read, without a copy."""
        start, size, private = place
        if private:
            both = mmap.PROT_READ | mmap.PROT_WRITE
            view = _Private(self.fd, size, flags=mmap.MAP_PRIVATE, prot=both, offset=start)
        else:
            self.reading = self.reading or mmap.mmap(self.fd, self.capacity, prot=mmap.PROT_READ)
            view = np.frombuffer(self.reading, np.uint8, size, start).view(_Shared)
        view.ref = ref
        return memoryview(view)

    def close(self):
        """Its memory goes with the last view of it, though an old ref may still hold the session."""
        os.close(self.fd)
        self.writing = self.reading = None


# ---- threads and connections: frames, and the handshake before the first -----------------------------------
def _thread(target, *args):
    threading.Thread(target=target, args=args, name='actors', daemon=True).start()


# A frame is a pickled list of messages (operation, request number, arguments); multiprocessing's Connection
# puts its length before it.
def _send(connection, messages):
    connection.send_bytes(pickle.dumps(messages, 5))


def _receive(connection):
    return pickle.loads(connection.recv_bytes(MAX_FRAME))


def _hang_up(connection):
    """Ends it for both sides; whoever reads it in another thread wakes up."""
    with socket.socket(fileno=os.dup(connection.fileno())) as sock, suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


_HELLO = b'actors/2 py%d.%d' % sys.version_info[:2]  # code travels as bytecode: one Python everywhere
_HELLO = _HELLO.ljust(16)


def _open(sock):
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(sock.detach())


@contextmanager
def _deadline(connection):
    """Whoever dials or knocks has so many seconds in all, however slowly it speaks."""
    timer = threading.Timer(HANDSHAKE, _hang_up, [connection])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shake(connection, token, me, other):
    """Both sides prove that they know the token, the client first: a stranger at the port learns nothing.
    -> (what the other side runs, whether it knows the token). Frames of at most 48 bytes; nothing in them is
    interpreted. me, other: b'client', b'server'; a proof that is played back to its author is worth
    nothing."""
    mine = secrets.token_bytes(32)
    connection.send_bytes(_HELLO + mine)
    hello = connection.recv_bytes(48)
    nonces = b''.join(sorted([mine, hello[16:]]))
    mine, theirs = (hmac.digest(token.encode(), who + nonces, 'sha256') for who in (me, other))
    if me == b'client':
        connection.send_bytes(mine)
    known = hmac.compare_digest(connection.recv_bytes(32), theirs) and hello[:16] == _HELLO
    if me == b'server':
        connection.send_bytes(mine if known else b'')
    return hello[:16], known


def _connect(address, token):
    """-> a Connection whose other end knows the token. ConnectionError, AuthenticationError."""
    host, _, port = address.rpartition(':')
    if not port.isdigit():
        raise ValueError(f'address {address!r}: expected HOST:PORT')
    try:
        connection = _open(socket.create_connection((host or '127.0.0.1', port), HANDSHAKE))
        with _deadline(connection):
            version, known = _shake(connection, token, b'client', b'server')
    except (OSError, EOFError) as e:
        hint = f'start one: python actors.py --head=True --port={port}'
        raise ConnectionError(f'no head at {address} ({e}); {hint}') from None
    if version != _HELLO:
        raise AuthenticationError(f'{address} runs {version!r}, this {_HELLO!r}: use one Python version')
    if not known:
        raise AuthenticationError(f'{address} refused the token: set ACTORS_TOKEN to what the head printed')
    return connection


def _token_file(address):
    """Where a head on this machine leaves the token for its port."""
    file = pathlib.Path.home() / '.cache' / 'actors' / f'token-{address.rpartition(":")[2]}'
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return file


def _find_token(address):
    token, file = os.environ.get('ACTORS_TOKEN'), _token_file(address)
    if not token and not file.exists():
        raise ValueError(f'no token for {address}: set ACTORS_TOKEN to what the head printed')
    return token or file.read_text().strip()


# ---- records -----------------------------------------------------------------------------------------------
_record = functools.partial(dataclasses.dataclass, eq=False, slots=True)
_field = dataclasses.field

# What .options() comes to. need: {resource: amount}; strategy: (DEFAULT,), (SPREAD,), (node, id, soft) or
# (group, id, bundle)
_Plan = namedtuple('_Plan', 'num_returns need strategy env retries retry_exceptions')
# What a client submits. kind: task, create (an actor) or call (of its method); data: the packed arguments,
# None: they are the first of deps; deps: ids of refs at the arguments' top level; contained: of refs inside;
# returns: of results
_Spec = namedtuple('_Spec', 'id kind name function method data deps contained returns plan actor')
# An actor in the making. meta: what its handles know of its methods
_Made = namedtuple('_Made', 'id restarts task_retries max_concurrency name get_if_exists meta')
_Lease = namedtuple('_Lease', 'pool need gpus')  # what a worker holds of a node's or a bundle's resources


def _covers(amounts, need):
    return all(amounts.get(k, 0) >= amount - 1e-6 for k, amount in need.items())


class _Resources:
    """What a node, or one bundle of a placement group, has and has free. GPUs are told apart: id -> free
    share."""
    def __init__(self, total, gpus):
        self.total, self.free, self.gpus = total, dict(total), dict(gpus)

    def choose(self, need):
        """The GPU ids it would give. A share of a GPU goes where it leaves the least over."""
        gpus = need.get('GPU', 0)
        fitting = sorted((free, gpu) for gpu, free in self.gpus.items() if free >= min(gpus, 1) - 1e-6)
        return [gpu for _, gpu in fitting[:math.ceil(gpus)]]

    def fits(self, need):
        return _covers(self.free, need) and len(self.choose(need)) >= need.get('GPU', 0)

    def change(self, need, gpus, sign):
        for k, amount in need.items():
            self.free[k] = round(self.free[k] + sign * amount, 6)
        for gpu in gpus:
            self.gpus[gpu] = round(self.gpus[gpu] + sign * min(need['GPU'], 1), 6)

    def take(self, need):
        gpus = self.choose(need)
        self.change(need, gpus, -1)
        return _Lease(self, need, tuple(gpus))


@_record
class _Object:
    refs: int = 1            # of all processes, of objects that hold it, of tasks that need it
    ready: bool = False
    error: bool = False      # the value is an exception
    data: object = None      # the packed value: bytes, or its place in the arena
    contained: tuple = ()    # ids of the refs inside
    waits: dict = _field(default_factory=dict)  # the _Waits that look at it, as keys: they keep their order
    actor: object = None     # the _Actor whose handle this is


@_record
class _Wait:
    """Calls then() once when all but `spare` of the objects are ready."""
    left: set
    spare: int
    then: object


@_record
class _Task:
    """Reads like its spec: task.name is task.spec.name."""
    spec: _Spec
    job: bytes               # the program that it belongs to
    parent: bytes            # the task that submitted it
    retries: int             # left
    actor: object = None     # the _Actor of a create or call; spec.actor is its id
    peer: object = None      # the worker that has it
    line: object = ()        # where it waits: the scheduler's queue, or its actor's
    cancelled: bool = False

    def __getattr__(self, name):
        return getattr(self.spec, name)


@_record
class _Actor:
    handle: _Object
    create: _Task
    made: _Made
    restarts: int            # left; -1: without end
    state: str = 'pending'   # then alive, restarting, dead
    peer: object = None
    error: bytes = None      # why it is dead
    waiting: bool = False    # the first call of the queue waits for an argument
    queue: deque = _field(default_factory=deque)  # calls that have not left yet
    inflight: dict = _field(default_factory=dict)                         # calls that its process has


@_record
class _Group:
    bundles: list
    strategy: str
    job: bytes
    places: list             # of each bundle: the node, its own resources, its lease of the node's


@_record
class _Node:
    id: str
    host: str
    resources: _Resources
    peer: object = None      # the node's daemon; None: the runtime's own node
    idle: list = _field(default_factory=list)     # workers without a task
    workers: dict = _field(default_factory=dict)  # id: worker


class _Peer:
    """Another process as the runtime sees it: a worker, a program elsewhere, a node. A thread reads it,
    another writes to it, neither with the lock: a process that is slow or stopped holds up nobody else."""
    def __init__(self, role, id, node=None, connection=None):
        self.role, self.id = role, id
        self.node, self.connection = node, connection
        self.shares = node is not None and node.peer is None  # whether it has part in the arena
        self.outbox, self.heard = queue.SimpleQueue(), time.monotonic()
        self.refs = {}         # id of an object: how often this process refers to it
        self.places = set()    # room in the arena that it was given and has not filled yet
        self.waits = {}        # request: the _Wait of a get or wait in progress
        self.job, self.key = id, None  # key: (env, GPU ids) of a worker
        self.task = self.actor = self.lease = None
        self.blocked, self.dead = 0, False
        self.reason = None     # why it was ended on purpose: words, or the error of its task

    def send(self, *message):
        self.outbox.put(message)

    def write(self):
        with suppress(OSError):  # it is gone: the reading thread says so
            while not self.dead:
                messages = [self.outbox.get()]
                while not self.outbox.empty():
                    messages.append(self.outbox.get())
                _send(self.connection, messages)

    def serve(self, runtime):
        """Until the connection ends."""
        _thread(self.write)
        try:
            while True:
                messages = _receive(self.connection)
                self.heard = time.monotonic()
                for message in messages:
                    runtime.handle(self, message)
        except (EOFError, ConnectionError):
            runtime.lost(self, 'its process ended')
        except Exception as e:  # oversized or garbled: this connection ends, nothing else does
            print(f'actors: dropped {self.role} {self.id.hex()}: {type(e).__name__}: {e}', file=sys.stderr)
            runtime.lost(self, 'it said what is no message')


# ---- the directory: objects --------------------------------------------------------------------------------
class _Directory:
    """Every object: where its value is, who refers to it, who waits for it."""
    def __init__(self, capacity):
        self.arena, self.objects = _Arena(capacity), {}
        self.space = _Free(self.arena.capacity)
        self.later = deque()  # what became possible; called by settle(): long chains are no deep stacks
        self.unheld = None    # called with an actor whose last handle is gone

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
        self.space.give(obj.data)
        for inner in obj.contained:
            self.refer(inner, -1)

    def fulfil(self, oid, data, contained=(), error=False):
        obj = self.objects.get(oid)
        if obj is None or obj.ready:  # a late result that nobody waits for
            self.space.give(data)
            return
        obj.ready, obj.error = True, error
        obj.data, obj.contained = data, contained
        for inner in contained:
            self.refer(inner, 1)
        for wait in obj.waits:
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
                raise ObjectLostError(f'object {oid.hex()} is not known: freed, or of an earlier session')
        wait = _Wait({oid for oid in oids if not self.objects[oid].ready}, spare, then)
        if len(wait.left) <= spare:
            return None
        for oid in wait.left:
            self.objects[oid].waits[wait] = None
        return wait

    def unwatch(self, wait):
        for oid in wait.left:
            if oid in self.objects:
                self.objects[oid].waits.pop(wait, None)

    def values(self, oids, peer):
        """[(id, is it an error, data)]; a process that has no part in the arena gets bytes."""
        values = []
        for oid in oids:
            obj = self.objects[oid]
            apart = isinstance(obj.data, tuple) and not peer.shares
            values.append((oid, obj.error, bytes(self.arena.view(obj.data)) if apart else obj.data))
        return values


# ---- the scheduler: resources ------------------------------------------------------------------------------
class _Scheduler:
    """Which task starts where. One queue for each (needs, strategy): the first that does not fit stops only
    its kind."""
    def __init__(self):
        self.nodes, self.queues, self.groups = {}, {}, {}
        self.changed = False

    def add(self, task):
        plan = task.plan
        key = tuple(plan.need.items()), plan.strategy
        totals = (node.resources.total for node in self.nodes.values())
        if key not in self.queues and not any(_covers(total, plan.need) for total in totals):
            print(f'actors: {task.name} asks for {plan.need}; no node has that much (all together: '
                  f'{self.sum("total")}). It waits for a node to join.', file=sys.stderr)
        task.line = self.queues.setdefault(key, deque())
        task.line.append(task)
        self.changed = True

    def sum(self, which):
        """All nodes' resources: total or free."""
        amounts = Counter()
        for node in self.nodes.values():
            amounts.update(getattr(node.resources, which))
        return {k: float(round(v, 4)) for k, v in amounts.items() if v > 0}

    def give(self, lease, lent=0):
        """lent: its CPUs are back already."""
        need = {**lease.need, 'CPU': 0} if lent and 'CPU' in lease.need else lease.need
        lease.pool.change(need, lease.gpus, 1)
        self.changed = True

    def next(self):
        """(task, node, resources to take from) of each task that can start; the caller takes them before the
        next. (task, None, None): it never can."""
        for key, line in list(self.queues.items()):
            while line:
                spots, need = self.spots(*key[1]), line[0].plan.need
                fitting = (spot for spot in spots if spot and spot[1].fits(need))
                spot = next(fitting, None)
                if spots and not spot:
                    break
                yield line.popleft(), *(spot or (None, None))
            if not line:
                self.queues.pop(key, None)

    def spots(self, kind, *where):
        """[(node, resources)] to look at, in this order; none: there never will be one."""
        if kind == 'group':
            key, i = where
            places = self.groups[key].places if key in self.groups else []
            return [place and place[:2] for place in (places if i < 0 else places[i:i + 1])]
        nodes = list(self.nodes.values())
        if kind == 'SPREAD':
            nodes.sort(key=lambda node: len(node.workers) - len(node.idle))
        if kind == 'node':
            insisted = [node for node in nodes if node.id == where[0]]
            nodes = insisted + nodes * where[1]  # soft: any other is second best
        return [(node, node.resources) for node in nodes]

    # -- placement groups
    def place(self, group):
        """Whether all its missing bundles found room; if not, none is taken."""
        nodes = list(self.nodes.values())
        choices = [[node] for node in nodes] if 'PACK' in group.strategy else []  # on one, if that can be
        if group.strategy != 'STRICT_PACK':
            choices.append(nodes)
        return any(self.place_on(choice, group) for choice in choices)

    def place_on(self, nodes, group):
        """Each bundle on the fullest node that fits; PACK prefers nodes in use, SPREAD unused ones. Big
        bundles first: greedy, so a STRICT_SPREAD over very unequal nodes may wait without need."""
        places, packs = list(group.places), group.strategy == 'PACK'
        missing = [i for i, place in enumerate(places) if place is None]
        for i in sorted(missing, key=lambda i: -sum(group.bundles[i].values())):
            bundle, used = group.bundles[i], [place[0] for place in places if place]
            barred = used if group.strategy == 'STRICT_SPREAD' else ()
            fitting = [node for node in nodes if node not in barred and node.resources.fits(bundle)]
            if not fitting:
                for lease in (places[j][2] for j in missing if places[j]):
                    lease.pool.change(lease.need, lease.gpus, 1)
                return False
            node = min(fitting, key=lambda node: ((node in used) != packs, sum(node.resources.free.values())))
            lease = node.resources.take(bundle)
            places[i] = node, _Resources(bundle, {gpu: min(bundle['GPU'], 1) for gpu in lease.gpus}), lease
        group.places = places
        return True


# ---- the runtime: tasks, actors, workers -------------------------------------------------------------------
_LATER = object()  # the answer comes when it is there
_NEVER = {'node': (TaskUnschedulableError, ActorUnschedulableError, 'its node is gone, and soft=False'),
          'group': (TaskPlacementGroupRemoved, ActorPlacementGroupRemoved, 'its placement group was removed')}


class _Desk:
    """Where messages arrive: all state, one lock. on_<operation>(peer, request, ...) runs under it, for the
    driver in its own thread, for the others in the threads that read them; what it returns is the answer.
    Here: what is asked about objects."""
    def __init__(self, resources, gpus, capacity):
        self.lock, self.closed = threading.RLock(), False
        self.directory, self.scheduler = _Directory(capacity), _Scheduler()
        self.inner = None  # the session of the driver that this is a part of
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
            for key, group in self.scheduler.groups.items():
                if None in group.places and self.scheduler.place(group):
                    self.directory.fulfil(key, _Packed(True).join())
            for task, node, resources in self.scheduler.next():
                self.start(task, node, resources)

    def refer(self, peer, oid, change):
        """Counted for the process too: when it dies, its refs go."""
        count = peer.refs.pop(oid, 0) + change
        if count:
            peer.refs[oid] = count
        self.directory.refer(oid, change)

    def add(self, peer, oid, **known):
        """A new object, with one ref: the process's that asked."""
        peer.refs[oid] = 1
        obj = self.directory.objects[oid] = _Object(**known)
        return obj

    def on_refs(self, peer, _, events):
        for oid, change in events:
            self.refer(peer, oid, change)

    def on_room(self, peer, _, size, private, data):
        """A place in the arena; a process that has no part in it sends the bytes along."""
        place = self.directory.space.take(size), size, private
        if data:
            self.directory.arena.write(place, [(0, data)])
        peer.places.add(place)
        return place

    def on_put(self, peer, _, oid, data, contained):
        self.add(peer, oid)
        self.fulfil(peer, oid, data, contained)

    def fulfil(self, peer, oid, data, contained):
        if isinstance(data, tuple):
            peer.places.remove(data)  # it is the object's from now on
        self.directory.fulfil(oid, data, contained)

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
        return self.answer_when(peer, request, oids, 0, lambda: self.directory.values(oids, peer))

    def on_wait(self, peer, request, oids, count):
        objects, spare = self.directory.objects, len(oids) - count
        return self.answer_when(peer, request, oids, spare, lambda: [objects[oid].ready for oid in oids])

    def on_drop(self, peer, _, request):
        wait = peer.waits.pop(request, None)
        if wait:
            self.directory.unwatch(wait)
            self.block(peer, -1)

    def block(self, peer, change):
        """A worker that waits lends its CPUs, or nested tasks would wait for each other for ever. Taken back
        even if that overdraws."""
        before, peer.blocked = peer.blocked, peer.blocked + change
        if peer.lease and bool(before) != bool(peer.blocked) and 'CPU' in peer.lease.need:
            peer.lease.pool.free['CPU'] += change * peer.lease.need['CPU']
            self.scheduler.changed = True

    def on_info(self, peer, _, what):
        if what == 'nodes':
            return [dict(NodeID=node.id, Alive=True, NodeManagerAddress=node.host,
                         NodeManagerHostname=node.host, Resources=node.resources.total)
                    for node in self.scheduler.nodes.values()]
        space, amounts = self.directory.space, self.scheduler.sum(what)
        amounts['object_store_memory'] = float(space.capacity - (space.used() if what == 'free' else 0))
        return amounts


class _Runtime(_Desk):
    """The life of tasks, actors and workers."""
    def __init__(self, *machine):
        super().__init__(*machine)
        self.directory.unheld = self.out_of_scope
        self.tasks, self.names, self.peers = {}, {}, {}
        self.nursery = _Nursery(self.directory.arena, self.home.id)
        _thread(self.tick)

    # -- tasks
    def admit(self, peer, spec):
        parent = peer.task and peer.task.id
        task = self.tasks[spec.id] = _Task(spec, peer.job, parent, spec.plan.retries)
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
        actor = task.actor = self.directory.objects[spec.actor].actor  # there: the caller has a handle
        if actor.state == 'dead':
            self.fail(task, actor.error)
            return
        task.retries, task.line = actor.made.task_retries, actor.queue
        actor.queue.append(task)
        self.pump(actor)

    def failed_argument(self, task):
        """Whether an argument's value is an error; then the task ends with it."""
        wrong = [oid for oid in task.deps if self.directory.objects[oid].error]
        if wrong and task.kind == 'create':
            self.bury(task.actor, 'an argument of its constructor could not be computed')
        elif wrong:
            self.fail(task, self.directory.objects[wrong[0]].data)
        return bool(wrong)

    def enqueue(self, task):
        """To the scheduler, once its arguments exist."""
        if task.id not in self.tasks or self.directory.watch(task.deps, 0, lambda: self.enqueue(task)):
            return
        if not self.failed_argument(task):
            self.scheduler.add(task)

    def start(self, task, node, resources):
        plan = task.plan
        if node is None:
            task_error, actor_error, words = _NEVER[plan.strategy[0]]
            self.fail(task, (actor_error if task.actor else task_error)(f'{task.name}: {words}'))
            return
        lease = resources.take(plan.need)
        key = plan.env, lease.gpus
        peer = next((idle for idle in node.idle if idle.key == key), None)
        if peer:
            node.idle.remove(peer)
        else:
            peer = self.spawn(node, key)
        peer.task, peer.lease, peer.job = task, lease, task.job
        if task.actor:
            task.actor.peer, peer.actor = peer, task.actor
        self.run_on(task, peer)

    def run_on(self, task, peer):
        task.peer = peer
        made = task.actor.made if task.kind == 'create' else None
        peer.send('run', task.spec, made, self.directory.values(task.deps, peer))

    def pump(self, actor):
        """Calls leave in the order they came; the first whose arguments are not there yet holds up the
        rest."""
        def again():
            actor.waiting = False
            self.pump(actor)
        while actor.queue and actor.state == 'alive' and not actor.waiting:
            task = actor.queue[0]
            if self.directory.watch(task.deps, 0, again):
                actor.waiting = True
                return
            actor.queue.popleft()
            if not self.failed_argument(task):
                actor.inflight[task.id] = task
                self.run_on(task, actor.peer)

    def mine(self, peer, tid):
        """The task if this worker still has it; it may be cancelled or given to another meanwhile."""
        task = self.tasks.get(tid)
        return task if task and task.peer is peer else None

    def on_done(self, peer, _, tid, results):
        task = self.mine(peer, tid)
        returns = task.returns if task else [None] * len(results)
        for oid, result in zip(returns, results):
            self.fulfil(peer, oid, *result)
        if task is None:
            return
        self.finish(task)
        actor = task.actor
        if actor is None:
            self.release(peer)
            return
        if task.kind == 'create':
            peer.task, actor.state = None, 'alive'
            self.pump(actor)
        self.out_of_scope(actor)

    def on_fail(self, peer, _, tid, retry, error):
        task = self.mine(peer, tid)
        if task is None:
            return
        if not (retry and self.again(task)):
            self.fail(task, error)
        if not task.actor:
            self.release(peer)

    def again(self, task):
        """Whether it may be tried once more; then it is."""
        if task.cancelled or not task.retries:
            return False
        task.retries, task.peer = task.retries - 1, None
        if task.kind == 'call':
            task.actor.queue.appendleft(task)
        else:
            self.enqueue(task)
        return True

    def fail(self, task, error):
        """error: an exception, or one that is packed."""
        data = error if isinstance(error, bytes) else _Packed(error).join()
        if task.kind == 'create' and task.actor.state != 'dead':
            self.bury(task.actor, data)
            return
        for oid in task.returns:
            self.directory.fulfil(oid, data, error=True)
        self.finish(task)

    def finish(self, task):
        """The task is over: what it held goes. An actor's creation keeps its arguments as long as it may be
        repeated."""
        if task.actor:
            task.actor.inflight.pop(task.id, None)
        if task.kind == 'create' and task.actor.state != 'dead':
            return
        if self.tasks.pop(task.id, None):
            for oid in (*task.deps, *task.contained):
                self.directory.refer(oid, -1)

    def on_cancel(self, peer, _, tid, force, recursive):
        """What waits is dropped. The process of a task that runs is killed; an actor's call that runs goes
        on."""
        task = self.tasks.get(tid)
        if task is None:
            return
        if task.actor and force:
            raise ValueError('force=True is not supported for actor tasks: use actors.kill')
        task.cancelled = True
        for child in [t.id for t in self.tasks.values() if recursive and t.parent == tid]:
            self.on_cancel(peer, 0, child, False, True)
        if task.peer is None:
            if task in task.line:
                task.line.remove(task)
            self.fail(task, TaskCancelledError(f'{task.name} was cancelled before it ran'))
        elif task.actor:
            task.peer.send('cancel', tid)  # it may still be in the worker's queue
        else:
            self.slay(task.peer, TaskCancelledError(f'{task.name} was cancelled while it ran'))

    # -- actors
    def on_create(self, peer, request, spec, made):
        if made.name in self.names and made.get_if_exists:
            return self.on_get_actor(peer, request, made.name)
        if made.name in self.names:
            raise ActorAlreadyExistsError(f'name {made.name!r} is taken: get_actor(), or get_if_exists=True')
        handle = self.add(peer, made.id, ready=True)
        task = self.admit(peer, spec)
        handle.actor = task.actor = _Actor(handle, task, made, made.restarts)
        if made.name:
            self.names[made.name] = task.actor
        self.enqueue(task)
        return made

    def on_get_actor(self, peer, _, name):
        if name not in self.names:
            raise ValueError(f'Failed to look up actor with name {name!r}: never created, or dead')
        made = self.names[name].made
        self.refer(peer, made.id, 1)
        return made

    def on_kill(self, peer, _, aid, no_restart):
        reason = 'it was killed by actors.kill' if no_restart else None
        self.end_actor(self.directory.objects[aid].actor, reason)

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
            self.bury(actor, str(peer.reason or why))
            return
        actor.restarts, actor.state = actor.restarts - 1, 'restarting'
        self.enqueue(actor.create)
        for task in reversed(list(actor.inflight.values())):
            if not self.again(task):
                words = f'{task.name}: the actor died in this call ({why}) and is restarting; it may have run'
                self.fail(task, ActorUnavailableError(words))
        actor.inflight.clear()

    def bury(self, actor, why):
        """why: words, or an error that is packed."""
        if isinstance(why, str):
            name = actor.create.name.removesuffix('.__init__')
            why = _Packed(ActorDiedError(f'{name}: the actor is dead: {why}')).join()
        actor.state, actor.error = 'dead', why
        self.names.pop(actor.made.name, None)
        calls = [*actor.inflight.values(), *actor.queue]
        actor.queue.clear()
        for task in calls:
            self.fail(task, why)
        if actor.create in actor.create.line:
            actor.create.line.remove(actor.create)
        self.finish(actor.create)
        if actor.peer:
            actor.peer.send('exit', 0)
        self.directory.refer(actor.made.id, 0)

    def out_of_scope(self, actor):
        """No handle is left anywhere, and nothing is to be done: the actor goes."""
        idle = actor.state == 'alive' and not actor.queue and not actor.inflight
        if idle and actor.handle.refs <= 0:
            actor.peer.reason = 'its last handle went out of scope'
            self.bury(actor, actor.peer.reason)

    # -- workers
    def spawn(self, node, key):
        env, gpus = dict(key[0]), key[1]
        if gpus:
            env['CUDA_VISIBLE_DEVICES'] = env['ACTORS_GPUS'] = ','.join(gpus)
        peer = _Peer('worker', secrets.token_bytes(8), node)
        self.peers[peer.id] = node.workers[peer.id] = peer
        peer.key = key
        if node.peer:
            node.peer.send('spawn', 0, peer.id, env)
            return peer
        if self.nursery.process.poll() is not None:  # it was killed; its workers see that, and go
            self.nursery = _Nursery(self.directory.arena, self.home.id)
        ours, theirs = socket.socketpair()
        peer.connection = Connection(ours.detach())
        _thread(peer.serve, self)
        with theirs:
            self.nursery.spawn(peer.id, env, theirs)
        return peer

    def release(self, peer):
        """A task's worker is free for the next task of its kind. It goes home if more wait idle than there
        are CPUs, and if it had a GPU: a process that lives may hold the GPU's memory. What it held is free
        when it is gone."""
        peer.task, node = None, peer.node
        if peer.lease.gpus or len(node.idle) > max(2, node.resources.total.get('CPU', 0)):
            peer.send('exit', 0)
            return
        self.scheduler.give(peer.lease, peer.blocked)
        peer.lease = None
        node.idle.append(peer)

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
            self.directory.space.give(place)
        for oid, count in peer.refs.items():
            self.directory.refer(oid, -count)
        if peer.lease:
            self.scheduler.give(peer.lease, peer.blocked)
        getattr(self, peer.role + '_down')(peer, why)

    def worker_down(self, peer, why):
        task, node = peer.task, peer.node
        del node.workers[peer.id]
        if peer in node.idle:
            node.idle.remove(peer)
        if node.peer:
            node.peer.send('kill', 0, peer.id)
        else:
            self.nursery.kill(peer.id)
        if peer.actor:
            self.actor_down(peer.actor, peer, why)
        elif task and (peer.reason or not self.again(task)):
            crashed = f'the worker of {task.name} died ({why}) and no retry is left; max_retries allows more'
            self.fail(task, peer.reason or WorkerCrashedError(crashed))

    def driver_down(self, peer, _):
        """A program is gone: its tasks, actors and groups go too."""
        for task in [task for task in self.tasks.values() if task.job == peer.id]:
            if task.kind == 'create':
                self.end_actor(task.actor, 'its program ended')
            elif task.kind == 'task':
                self.on_cancel(peer, 0, task.id, False, False)
        for key in [key for key, group in self.scheduler.groups.items() if group.job == peer.id]:
            self.on_remove_group(peer, 0, key)

    # -- placement groups
    def on_group(self, peer, _, key, bundles, strategy):
        """key: the group's, and that of the object that is there once every bundle has its place."""
        self.add(peer, key)
        self.scheduler.groups[key] = _Group(bundles, strategy, peer.job, [None] * len(bundles))
        self.scheduler.changed = True

    def on_remove_group(self, peer, _, key):
        group = self.scheduler.groups.pop(key, None)
        if group is None:
            return
        removed = TaskPlacementGroupRemoved('its placement group was removed')
        for node, resources, lease in filter(None, group.places):
            for worker in list(node.workers.values()):
                if worker.lease and worker.lease.pool is resources:
                    self.slay(worker, removed)
            self.scheduler.give(lease)
        self.directory.fulfil(key, _Packed(removed).join(), error=True)

    # -- nodes
    def tick(self):
        while not self.closed:
            time.sleep(BEAT)
            with self.lock:
                self.drain()
                peers = list(self.peers.values())
            for peer in peers:
                if peer.role == 'node':
                    peer.send('beat', 0)
                elif peer.connection:  # its end tells
                    continue
                limit = SILENCE if peer.role == 'node' else START
                if time.monotonic() - peer.heard > limit:
                    self.lost(peer, f'no sign of life for {limit:.0f} s')

    def node_down(self, peer, why):
        node = peer.node
        print(f'actors: node {node.id[:8]} ({node.host}) is lost: {why}', file=sys.stderr)
        del self.scheduler.nodes[node.id]
        for group in self.scheduler.groups.values():
            group.places = [None if place and place[0] is node else place for place in group.places]
        for worker in list(node.workers.values()):
            self.end(worker, 'its node was lost')

    def close(self):
        with self.lock:
            self.closed = True
        self.nursery.close()  # the workers end with it
        self.directory.arena.close()


class _Head(_Runtime):
    """The runtime of a cluster: a process of its own, with a port where programs, nodes and their workers
    knock."""
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
                _thread(self.greet, sock)
            else:
                sock.close()

    def greet(self, sock):
        peer = None
        with suppress(Exception):  # noise, or one of us that speaks out of turn: it is not answered
            connection = _open(sock)
            with _deadline(connection):
                if _shake(connection, self.token, b'server', b'client')[1]:
                    hello, = _receive(connection)
                    peer = self.welcome(connection, *hello)
        self.strangers.release()
        if peer:
            peer.serve(self)  # this thread reads it from now on

    def welcome(self, connection, operation, request, role, id, *machine):
        """machine: a node's host name, resources and GPUs."""
        if operation != 'hello':
            raise ConnectionError(f'{operation} before hello')
        with self.lock:
            if role == 'worker':  # its record was made when it was ordered
                peer = self.peers[id]
                peer.connection = connection
                return peer
            peer = self.peers[id] = _Peer(role, id, connection=connection)
            if role == 'node':
                host, *amounts = machine
                peer.node = self.scheduler.nodes[id.hex()] = _Node(id.hex(), host, _Resources(*amounts), peer)
                self.scheduler.changed = True
            peer.send('reply', request, self.home.id)
            self.settle()
        return peer


# ---- sessions: the client's side, of every driver and every worker -----------------------------------------
class _Session:
    """Numbers requests, waits for answers, packs and unpacks values, reports which refs came and went.
    Subclasses know how to reach the runtime: post(operation, request, arguments)."""
    def __init__(self, node, arena):
        self.node, self.arena, self.is_worker = node, arena, False
        self.prefix, self.count = secrets.token_bytes(8), itertools.count(1)
        self.boxes, self.exported, self.error = {}, {}, None  # boxes: request -> where its answer is put
        self.events = deque()  # (id, +1 or -1) of refs that came and went here; __del__ only appends to it,
                               # for it may run anywhere, under any lock

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
            if self.boxes.pop(request, None) is not None:
                self.post('drop', 0, request)
                raise GetTimeoutError(f'{operation}: not there after {timeout} s') from None
            answer = box.get()  # it came at the very end of the wait
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
        """(data, refs inside): its bytes, or its place in the arena if it is larger than INLINE."""
        if packed.size <= INLINE:
            return packed.join(), packed.contained
        data = None if self.arena else packed.join()
        place = self.call('room', packed.size, packed.private, data)
        if self.arena:
            self.arena.write(place, packed.parts)
        return place, packed.contained

    def put(self, packed):
        oid = self.new_id() + b'\xff\xff'
        self.post('put', 0, oid, *self.keep(packed))
        return ObjectRef(oid, True)

    def load(self, value):
        oid, _, data = value
        try:
            return _unpack(data if isinstance(data, bytes) else self.arena.view(data, ObjectRef(oid)))
        except Exception as e:
            reason = f'{type(e).__name__}: {e}'
            raise RaySystemError(f'the value of {oid.hex()} cannot be read here: {reason}') from e

    def get(self, refs, timeout):
        values = []
        for item in self.call('get', [ref._valid_id() for ref in refs], timeout=timeout):
            value, failed = self.load(item), item[1]
            if failed:
                raise value.as_instanceof_cause() if isinstance(value, RayTaskError) else value
            values.append(value)
        return values

    def wait(self, refs, count, timeout):
        oids = [ref._valid_id() for ref in refs]
        try:
            ready = self.call('wait', oids, count, timeout=timeout)
        except GetTimeoutError:
            ready = self.call('wait', oids, 0)
        done = list(itertools.compress(refs, ready))[:count]
        chosen = set(done)
        return done, [ref for ref in refs if ref not in chosen]

    def export(self, obj):
        """The ref under which workers find a function or class; put once in a session."""
        if obj not in self.exported:
            self.exported[obj] = self.put(_Packed(obj))
        return self.exported[obj]._id

    def submit(self, kind, name, function, method, args, kwargs, plan, actor=None, made=None):
        """-> the refs of the results, or what on_create says. Refs at the arguments' top level become
        dependencies; large arguments are put first."""
        values = [*args, *kwargs.values()]
        deps = [value._valid_id() for value in values if type(value) is ObjectRef]
        values = [_Arg if type(value) is ObjectRef else value for value in values]
        try:
            packed = _Packed((values, list(kwargs)))
        except (TypeError, AttributeError, pickle.PicklingError) as e:
            raise TypeError(f'could not serialize the arguments of {name}: {e}') from e
        data, contained = None, packed.contained + ([function] if function else [])
        if packed.size <= INLINE:
            data = packed.join()
        else:
            kept = self.put(packed)  # it must live until the task is sent
            deps.insert(0, kept._id)
        task = self.new_id()
        count = 0 if made else plan.num_returns
        returns = [task + i.to_bytes(2, 'big') for i in range(count)]
        spec = _Spec(task, kind, name, function, method, data, deps, contained, returns, plan, actor)
        if made:
            return self.call('create', spec, made)
        self.post('submit', 0, spec)
        refs = [ObjectRef(oid, True) for oid in returns]
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


class _Remote(_Session):
    """A session over a connection: a worker's, a node's, or that of a program which joined a cluster."""
    def __init__(self, connection, node, arena, is_worker=False):
        super().__init__(node, arena)
        self.connection, self.sending, self.is_worker = connection, threading.Lock(), is_worker
        _thread(self.tell)

    def post(self, *message):
        with self.sending:
            refs = [('refs', 0, self.pending_events())] if self.events else []
            try:
                _send(self.connection, [*refs, message])
            except OSError as e:
                self.broken(RaySystemError(f'the head is gone: {e}'))

    def tell(self):
        """Once a second: that this process lives, and the refs that went while nothing else was said."""
        parent = os.getppid()
        while not self.error:
            time.sleep(BEAT)
            self.post('refs', 0, [])
            if self.is_worker and os.getppid() != parent:
                _leave()  # the zygote was killed: nobody else would end this process

    def read(self):
        """Messages that are no answers, until the connection ends."""
        with suppress(EOFError, OSError):
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
        _hang_up(self.connection)


class _Arg:
    """Stands in the arguments for the next dependency."""


# ---- workers -----------------------------------------------------------------------------------------------
# what get_runtime_context tells: the _Spec of what runs here, and the _Made of the actor that this is
_running = contextvars.ContextVar('actors_running', default=(None, None))


class _Worker:
    """One process that runs tasks one after the other, or is one actor. A thread reads and only sorts; the
    main thread runs user code."""
    def __init__(self, session):
        self.session, self.jobs = session, queue.SimpleQueue()
        self.dropped = set()  # cancelled before they began
        self.actor = self.made = self.pool = None
        _thread(self.sort)

    def sort(self):
        for message in self.session.read():
            if message[0] == 'cancel':
                self.dropped.add(message[2])
            else:
                self.jobs.put(message)
        _leave()  # the runtime is gone: nobody wants what is running here

    def serve(self):
        while (message := self.jobs.get())[0] == 'run':
            spec, made, values = message[1:]
            self.made = made or self.made
            if self.pool:
                self.pool.submit(self.run, spec, values)
            else:
                self.run(spec, values)
        if self.pool:
            self.pool.shutdown()
        _leave()

    def prepare(self, spec, values):
        """-> the function and its arguments."""
        if spec.id in self.dropped:
            raise TaskCancelledError(f'{spec.name} was cancelled before it ran')
        loaded = map(self.session.load, values)
        args, names = next(loaded) if spec.data is None else _unpack(spec.data)
        args = [next(loaded) if arg is _Arg else arg for arg in args]
        count = len(args) - len(names)
        f = getattr(self.actor, spec.method) if spec.method else self.function(spec.function)
        return f, args[:count], dict(zip(names, args[count:]))

    @functools.cache
    def function(self, oid):
        return self.session.get([ObjectRef(oid)], None)[0]

    def run(self, spec, values):
        _running.set((spec, self.made))
        try:
            f, args, kwargs = self.prepare(spec, values)
            result = f(*args, **kwargs)
            del args, kwargs  # the refs in them go before the result is told
            if spec.kind == 'create':
                self.actor, result = result, None
                if self.made.max_concurrency > 1:
                    self.pool = futures.ThreadPoolExecutor(self.made.max_concurrency)
            self.done(spec, result)
        except BaseException as e:
            self.failed(spec, e)
        self.dropped.discard(spec.id)

    def done(self, spec, result):
        count = len(spec.returns)
        results = [result][:count] if count < 2 else list(result)
        if len(results) != count:
            raise ValueError(f'Task returned {len(results)} objects, but num_returns={count}.')
        self.session.post('done', 0, spec.id, [self.session.keep(_Packed(value)) for value in results])

    def failed(self, spec, e):
        retry = spec.plan.retry_exceptions
        if not isinstance(retry, bool):
            retry = isinstance(e, _unpack(retry))
        user = e.__traceback__.tb_next  # the first frame is ours
        text = ''.join(traceback.format_exception(type(e), e, user)).rstrip()
        where = f'(pid={os.getpid()}, node={self.session.node[:8]})'
        cause = e.cause if isinstance(e, RayTaskError) else e
        error = RayTaskError(spec.name, f'{spec.name}() {where}\n{text}', cause)
        if spec.kind == 'create':
            error = ActorDiedError(f'The actor died because of an error raised in its creation task, {error}')
        self.session.post('fail', 0, spec.id, retry, _Packed(error).join())


def _family(pid):
    """The processes that pid started or adopted, and theirs. Linux; elsewhere process groups must do."""
    family = []
    for file in glob.glob(f'/proc/{pid}/task/*/children'):
        with suppress(OSError), open(file, encoding='ascii') as f:
            for child in map(int, f.read().split()):
                family += [child, *_family(child)]
    return family


def _end(pids):
    for pid in pids:
        for kill in os.kill, os.killpg:  # the process, and its group if it leads one
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)


def _leave():
    """A worker ends, with all that it started."""
    sys.stdout.flush()
    sys.stderr.flush()
    _end(_family(os.getpid()))
    os._exit(0)


class _Nursery:
    """The zygote's parent: orders workers from it, for a node; on another machine than the head's they need
    its address and token."""
    def __init__(self, arena, node, address=None, token=None):
        self.about = node, address, token
        ours, theirs = socket.socketpair()
        self.link = Connection(ours.detach())
        folder, inherited = os.path.dirname(os.path.abspath(__file__)), [theirs.fileno()]
        if arena:
            inherited.append(arena.fd)
        start = f'import sys; sys.path.insert(0, {folder!r}); import actors; '
        start += f'actors._zygote({arena and arena.capacity}, *{inherited})'
        # one thread a library until a worker asks for more: a process that forks must have no threads
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        command = [sys.executable, '-c', start]
        self.process = subprocess.Popen(command, pass_fds=inherited, env=env, start_new_session=True)
        theirs.close()

    def spawn(self, worker, env, sock=None):
        modules = [module for module in PRELOAD if module in sys.modules]
        with suppress(OSError):  # it died: whoever asks next makes another
            self.link.send((worker, modules, env, sys.path, *self.about))
            if sock:
                reduction.send_handle(self.link, sock.fileno(), None)

    def kill(self, worker):
        with suppress(OSError):
            self.link.send((worker,))

    def close(self):
        self.link.close()  # it ends its children, and goes
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _zygote(capacity, fd, arena_fd=None):
    """Forks workers on order. Single-threaded for life: only that makes fork safe. Orders: the arguments of
    _worker, then the worker's socket if it is of this machine; or (id,) to kill one."""
    import gc
    link, workers = Connection(fd), {}  # workers: pid -> id
    if sys.platform == 'linux':  # PR_SET_CHILD_SUBREAPER: what a dead worker left behind is a child of this
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while True:
        asked = link.poll(0.5)
        _reap(workers)
        if not asked:
            continue
        try:
            worker, *order = link.recv()
            sock = reduction.recv_handle(link) if order and not order[-1] else None
        except (EOFError, OSError):
            _end_all(workers)
        if not order:
            for pid in [pid for pid, known in workers.items() if known == worker]:
                _end([pid, *_family(pid)])
            continue
        for module in order.pop(0):
            importlib.import_module(module)
        pid = os.fork()
        if pid:
            workers[pid] = worker
            if sock is not None:
                os.close(sock)
            continue
        try:
            os.setpgrp()  # its children are of its group, and end with it
            link.close()
            _worker(sock, arena_fd and _Arena(capacity, arena_fd), worker, *order)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)


def _reap(workers):
    with suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            if workers.pop(pid, None):  # else an orphan that was adopted
                _end([pid])


def _end_all(workers):
    """The parent is gone. Whoever waits for this process may rely on it: no child is left, adopted ones
    neither."""
    while True:
        _end([*workers, *_family(os.getpid())])
        try:
            workers.pop(os.waitpid(-1, 0)[0], None)
        except ChildProcessError:
            os._exit(0)


def _worker(fd, arena, worker, env, path, node, address, token):
    global _session
    os.environ.update(env)
    sys.path[:] = path
    sys.stdout.reconfigure(line_buffering=True)
    np.random.seed()  # the fork copied the zygote's generator
    if 'torch' in sys.modules:
        sys.modules['torch'].set_num_threads(int(env.get('OMP_NUM_THREADS', 1)))
    connection = _connect(address, token) if address else Connection(fd)
    os.set_inheritable(connection.fileno(), False)
    os.register_at_fork(after_in_child=connection.close)  # or a child would hold it open
    _session = _Remote(connection, node, arena, is_worker=True)
    if address:
        _session.post('hello', 0, 'worker', worker)
    _Worker(_session).serve()


# ---- the interface: Ray's ----------------------------------------------------------------------------------
def _ray():
    """The ray module if this process speaks through Ray: after init(backend='ray'), and in Ray's own
    workers."""
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
    """The ids of this machine's GPUs, counted as a trainer counts them: by torch, imported only where there
    is a card (NVIDIA's, the same under WSL2, or AMD's)."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [gpu for gpu in visible.split(',') if gpu.strip() not in ('', '-1')]
    cards = '/dev/nvidiactl', '/dev/dxg', '/dev/kfd'
    if 'torch' not in sys.modules and not any(map(os.path.exists, cards)):
        return []
    import torch
    return [str(i) for i in range(torch.cuda.device_count())]


def _machine(num_cpus=None, num_gpus=None, resources=None, object_store_memory=0):
    """-> {resource: amount}, {GPU id: share}, bytes of the arena: 30 % of memory, as in Ray; untouched pages
    cost nothing."""
    gpus = _count_gpus()
    if num_gpus is not None:
        gpus = [*gpus, *map(str, range(len(gpus), num_gpus))][:num_gpus]
    if num_cpus is None:
        num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    total = {'CPU': num_cpus, 'GPU': len(gpus), **(resources or {})}
    memory = object_store_memory or 0.3 * mmap.PAGESIZE * os.sysconf('SC_PHYS_PAGES')
    return {k: v for k, v in total.items() if v}, dict.fromkeys(gpus, 1), int(memory)


def init(num_cpus: float = None, num_gpus: int = None, resources: dict = None,
         object_store_memory: int = None, address: str = None, backend: str = 'local',
         ignore_reinit_error: bool = False, **ray_options):
    """Start here (backend='local'), join a cluster (address='HOST:PORT', token from ACTORS_TOKEN), or do
    everything on Ray (backend='ray'). num_cpus: processes that run at once; object_store_memory: bytes;
    ray_options go to ray.init. RuntimeError if already initialised, ValueError for what this backend does not
    honour."""
    global _session
    if is_initialized():
        if ignore_reinit_error:
            return
        raise RuntimeError('actors.init() was called already: shutdown() first, or ignore_reinit_error=True')
    given = dict(num_cpus=num_cpus, num_gpus=num_gpus, resources=resources,
                 object_store_memory=object_store_memory)
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
        _session = _Direct(_Runtime(*_machine(**given)))
    elif given:
        raise ValueError(f"{', '.join(given)}: for the head and its nodes to say, not for who joins")
    else:
        session = _Remote(_connect(address, _find_token(address)), '', None)
        _thread(session.listen)
        session.node = session.call('hello', 'driver', session.prefix, timeout=HANDSHAKE)
        _session = session
    atexit.register(shutdown)


def shutdown():
    """Ends the session and every process of it. Refs and handles of it are dead."""
    global _session
    if _session is not None and not _session.is_worker:  # a worker's session is its process
        session, _session = _session, None
        atexit.unregister(shutdown)
        session.broken(RaySystemError('actors.shutdown() was called'))
        session.close()
    elif _ray():
        _ray().shutdown()


def is_initialized() -> bool:
    return _session is not None or _ray() is not None


# what the user forks is not of this session
os.register_at_fork(after_in_child=lambda: globals().update(_session=None))


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
        raise TypeError('an ObjectRef travels as an argument, a result or inside put(), where it is counted, '
                        'not by plain pickle: that would lose count')

    def __await__(self):
        raise TypeError("`await ref` is Ray's: use actors.get(ref), in a thread if need be, or backend='ray'")


@_or_ray
def get(refs: ObjectRef | list, *, timeout: float = None):
    """The value of a ref, or the list for a list. Raises what the task raised. Arrays are read-only views of
    shared memory. GetTimeoutError after `timeout` seconds. get([put(1), put(2)]) -> [1, 2]"""
    many = refs if isinstance(refs, list) else [refs]
    for ref in many:
        if type(ref) is not ObjectRef:
            error = TypeError if many is refs else ValueError
            raise error(f'get() expected an ObjectRef or a list of them, got {ref!r}')
    values = _here().get(many, timeout)
    return values if many is refs else values[0]


@_or_ray
def put(value) -> ObjectRef:
    """A ref to a copy of value in the object store; 100 MB once, however many actors read it.
    ObjectStoreFullError."""
    if type(value) is ObjectRef:
        raise TypeError("Calling 'put' on an ObjectRef is not allowed; put it in a list if you mean that")
    return _here().put(_Packed(value))


@_or_ray
def wait(refs: list, *, num_returns: int = 1, timeout: float = None, fetch_local: bool = True):
    """(ready, rest), at most num_returns ready ones, in the order given. Returns when so many are ready, or
    at the timeout (seconds). fetch_local: values lie with the head, so there is nothing to fetch; both are
    the same."""
    if not isinstance(refs, list):
        raise TypeError(f'wait() expected a list of ObjectRef, got {refs!r}')
    if not refs:
        return [], []
    if not 0 < num_returns <= len(set(refs)) == len(refs) or timeout is not None and timeout < 0:
        raise ValueError('wait() expected refs that differ, num_returns from 1 to their number, timeout >= 0:'
                         f' got num_returns={num_returns}, timeout={timeout}, {refs}')
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
    TaskCancelledError. An actor's call is dropped if it has not begun. recursive: the tasks it submitted
    too."""
    if type(ref) is not ObjectRef:
        raise TypeError(f'cancel() expected an ObjectRef, got {type(ref).__name__}')
    _here().call('cancel', ref._valid_id()[:14], force, recursive)


@_or_ray
def get_actor(name: str, namespace: str = None):
    """The handle of a named actor. ValueError if there is none."""
    if namespace is not None:
        raise ValueError(f"namespace={namespace!r}: namespaces are Ray's, use backend='ray'")
    return _handle(_here().call('get_actor', name))


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
    """What the task or actor that asks was given of GPUs; a driver has none."""
    return [gpu for gpu in os.environ.get('ACTORS_GPUS', '').split(',') if gpu]


@_or_ray
def get_runtime_context():
    return _Context()


class _Context:
    """What runs here: ids as hex, None outside of a task."""
    def __init__(self):
        self._session = _here()
        self._spec, self._made = _running.get()

    def get_task_id(self):
        return self._spec and self._spec.id.hex()

    def get_actor_id(self):
        return self._made and self._made.id.hex()

    def get_actor_name(self):
        return self._made and (self._made.name or '')

    def get_node_id(self):
        return self._session.node

    def get_accelerator_ids(self):
        return {'GPU': get_gpu_ids()}

    def __getattr__(self, name):
        raise AttributeError(f"the runtime context has no {name}; Ray's own may, use backend='ray'")


def __getattr__(name):
    """actors.anything_else is Ray's."""
    ray = _ray()
    if ray and not name.startswith('__'):
        return getattr(ray, name)
    raise AttributeError(f"actors has no {name!r}; if Ray has it, use backend='ray'")


# -- options
# what holds where nothing is said; num_cpus then is 1 of a task, 0 of an actor
_COMMON = dict(num_cpus=None, num_gpus=0, resources=None, name=None, scheduling_strategy=None,
               runtime_env=None)
_TASK = _COMMON | dict(num_returns=1, max_retries=3, retry_exceptions=False)
_ACTOR = _COMMON | dict(max_restarts=0, max_task_retries=0, max_concurrency=1, get_if_exists=False)


def _check_options(options, known, what):
    for key, value in options.items():
        if key not in known and not _ray():  # Ray says what it knows itself
            near = difflib.get_close_matches(key, known, 1)
            hint = f'did you mean {near[0]}?' if near else "if Ray honours that, init(backend='ray') first"
            raise ValueError(f'Invalid option keyword {key} for {what}: {hint}')
        numeric = key in ('num_cpus', 'num_gpus', 'num_returns')
        if numeric and value is not None and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f'The quantity of {key} cannot be negative or no number: got {value!r}')


def _plan(options, name, default_cpus):
    """What the options come to here."""
    options = _TASK | options
    cpus, gpus, runtime_env = options['num_cpus'], options['num_gpus'], options['runtime_env'] or {}
    if set(runtime_env) - {'env_vars'}:
        raise ValueError(f"{name}: runtime_env {runtime_env}: all but env_vars needs backend='ray'")
    if gpus > 1 and gpus % 1:
        raise ValueError(f'num_gpus {gpus}: a share below 1, or whole GPUs')
    threads = str(max(1, int(cpus or default_cpus)))  # Ray's rule: as many as CPUs
    if cpus is None:
        cpus, threads = default_cpus, os.environ.get('OMP_NUM_THREADS', threads)
    need = {'CPU': cpus, 'GPU': gpus, **(options['resources'] or {})}
    need = {k: v for k, v in need.items() if v}
    strategy = _strategy(options['scheduling_strategy'], need, name)
    env = {'OMP_NUM_THREADS': threads, **runtime_env.get('env_vars', {})}
    pairs = tuple(sorted((k, str(v)) for k, v in env.items()))
    retry = options['retry_exceptions']
    if not isinstance(retry, bool):
        retry = _Packed(tuple(retry)).join()
    return _Plan(int(options['num_returns']), need, strategy, pairs, options['max_retries'], retry)


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
        raise ValueError(f'bundle index {i}: expected 0 to {group.bundle_count - 1}, or -1 for any')
    bundles = group.bundle_specs if i < 0 else [group.bundle_specs[i]]
    if not any(_covers(bundle, need) for bundle in bundles):
        raise ValueError(f'Cannot schedule {name}: {need} cannot fit into any bundle of {group.bundle_specs}')
    return 'group', group.id, i


def _signature(f, skip=0):
    """Only the shape: names and kinds; defaults and annotations may be anything, and handles travel."""
    parameters = list(inspect.signature(f).parameters.values())[skip:]
    return inspect.Signature([p.replace(default=p.empty if p.default is p.empty else None, annotation=p.empty)
                              for p in parameters])


def method(**options):
    """@actors.method(num_returns=2) on an actor's method."""
    _check_options(options, {'num_returns'}, 'methods')

    def mark(f):
        f._actors_method = options
        return f
    return mark


def remote(*args, **options):
    """@actors.remote or @actors.remote(num_cpus=2, ...) on a function or a class. Call f.remote(...),
    Class.remote(...); .options(...) overrides."""
    def wrap(target):
        if inspect.isclass(target):
            return ActorClass(target, options)
        if not callable(target):
            raise TypeError('The @actors.remote decorator must be applied to a function or a class')
        if inspect.isgeneratorfunction(target):
            raise TypeError(f'{target.__name__} is a generator: return a list, or call an actor repeatedly')
        if inspect.iscoroutinefunction(target):
            raise ValueError(f'{target.__name__} is a coroutine: wrap it in one that calls asyncio.run')
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
        raise TypeError(f"{self._what} cannot be called directly, as with {args} {kwargs}: try "
                        f"'{self.__name__}.remote()'")

    def options(self, **options):
        return type(self)(self._target, {**self._options, **options})

    def remote(self, *args, **kwargs):
        ray = _ray()
        session = ray or _here()
        if self._ready[0] is not session:
            self._ready = session, self._on_ray(ray) if ray else self._prepare(session)
        return self._ready[1](*args, **kwargs)

    def _on_ray(self, ray):
        wrapped = ray.remote(**self._options)(self._target) if self._options else ray.remote(self._target)
        return wrapped.remote


class RemoteFunction(_Remotable):
    _known, _what = _TASK, 'remote functions'

    def _prepare(self, session):
        signature, function = inspect.signature(self._target), session.export(self._target)
        plan = _plan(self._options, self.__name__, 1)
        name = self._options.get('name') or self.__qualname__

        def call(*args, **kwargs):
            signature.bind(*args, **kwargs)  # TypeError says what is wrong
            return session.submit('task', name, function, None, args, kwargs, plan)
        return call


class ActorClass(_Remotable):
    _known, _what = _ACTOR, 'actors'

    def _methods(self):
        return inspect.getmembers(self._target, lambda m: inspect.isfunction(m) or inspect.ismethod(m))

    def _on_ray(self, ray):
        for _, m in self._methods():
            if hasattr(m, '_actors_method'):
                ray.method(**m._actors_method)(m)
        return super()._on_ray(ray)

    def _prepare(self, session):
        shapes = {}
        for name, m in self._methods():
            if inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m):
                raise ValueError(f"{self.__name__}.{name} is a coroutine: that needs backend='ray'; here use "
                                 'plain methods, with max_concurrency=n for n at once')
            bound = isinstance(inspect.getattr_static(self._target, name), (staticmethod, classmethod))
            num_returns = getattr(m, '_actors_method', {}).get('num_returns', 1)
            shapes[name] = _signature(m, 0 if bound else 1), num_returns
        init = self._target.__init__
        signature = inspect.Signature() if init is object.__init__ else _signature(init, 1)
        options, function = _ACTOR | self._options, session.export(self._target)
        plan, meta = _plan(options, self.__name__, 0), pickle.dumps((self.__name__, shapes), 5)

        def call(*args, **kwargs):
            signature.bind(*args, **kwargs)
            actor_id, name = session.new_id() + b'\xfe\xff', f'{self.__name__}.__init__'
            made = _Made(actor_id, options['max_restarts'], options['max_task_retries'],
                         options['max_concurrency'] or 1, options['name'], options['get_if_exists'], meta)
            return _handle(session.submit('create', name, function, None, args, kwargs, plan, actor_id,
                                          made))
        return call


class ActorMethod:
    def __init__(self, handle, name, signature, num_returns):
        self._handle, self._name = handle, name
        self._signature, self._num_returns = signature, num_returns

    def options(self, **options):
        _check_options(options, {'num_returns'}, 'actor methods')
        return ActorMethod(self._handle, self._name, self._signature, **options)

    def remote(self, *args, **kwargs):
        self._signature.bind(*args, **kwargs)
        handle, plan = self._handle, _Plan(self._num_returns, {}, ('DEFAULT',), (), 0, False)
        name = f'{handle._class_name}.{self._name}'
        return _here().submit('call', name, None, self._name, args, kwargs, plan, handle._ref._valid_id())


class ActorHandle:
    """Calls of one process run in the order they were made (max_concurrency=1). The last handle gone, the
    actor ends."""
    def __init__(self, ref, meta):
        self._ref, self._meta = ref, meta
        self._class_name, self._methods = pickle.loads(meta)

    def __getattr__(self, name):
        if name not in self._methods:
            raise AttributeError(f'actor {self._class_name} has no method {name!r}')
        return ActorMethod(self, name, *self._methods[name])

    def __reduce__(self):
        return ActorHandle, (self._ref, self._meta)

    def __repr__(self):
        return f'Actor({self._class_name}, {self._ref.hex()})'

    def __eq__(self, other):
        return isinstance(other, ActorHandle) and other._ref == self._ref

    def __hash__(self):
        return hash(self._ref)


def _handle(made):
    return ActorHandle(ObjectRef(made.id, True), made.meta)


# -- util: placement groups, strategies, pool
class PlacementGroup:
    """A reservation. bundle_specs as asked for; ready() is a ref that is there once all bundles are
    reserved."""
    def __init__(self, ref, bundles):
        self.id, self._ref = ref._id, ref
        self.bundle_specs, self.bundle_count = bundles, len(bundles)

    def ready(self) -> ObjectRef:
        return self._ref

    def wait(self, timeout_seconds: float = 30) -> bool:
        return bool(wait([self._ref], timeout=timeout_seconds)[0])


def placement_group(bundles: list, strategy: str = 'PACK', name: str = '',
                    lifetime: str = None) -> PlacementGroup:
    """Reserve bundles ([{'CPU': 2, 'GPU': 1}, ...]) all or none. PACK: on few nodes, SPREAD: on many,
    STRICT_: insist. Returns at once."""
    if name or lifetime:
        raise ValueError(f"name={name!r}, lifetime={lifetime!r}: only Ray honours that, use backend='ray'")
    asked = [{k: v for k, v in bundle.items() if v} for bundle in bundles]
    if not asked or not all(asked) or any(v < 0 for bundle in asked for v in bundle.values()):
        raise ValueError(f'bundles: expected resources such as [{{"CPU": 1}}], none empty, got {bundles}')
    if strategy not in ('PACK', 'SPREAD', 'STRICT_PACK', 'STRICT_SPREAD'):
        raise ValueError(f'strategy {strategy!r}: expected PACK, SPREAD, STRICT_PACK or STRICT_SPREAD')
    key = _here().new_id()
    _session.call('group', key, asked, strategy)
    return PlacementGroup(ObjectRef(key, True), asked)


def remove_placement_group(group: PlacementGroup):
    """Gives the reservation back; tasks and actors in it are killed."""
    _here().call('remove_group', group.id)


class PlacementGroupSchedulingStrategy:
    def __init__(self, placement_group, placement_group_bundle_index=-1,
                 placement_group_capture_child_tasks=None):
        if placement_group_capture_child_tasks:
            raise ValueError('placement_group_capture_child_tasks: give children their own strategy')
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index


class NodeAffinitySchedulingStrategy:
    def __init__(self, node_id, soft):
        self.node_id, self.soft = node_id, soft


class ActorPool:
    """Hands values to whichever actor is free: pool.map(lambda actor, value: actor.work.remote(value),
    values). An actor that died leaves the pool."""
    def __init__(self, actors):
        self._idle, self._waiting = list(actors), deque()
        self._busy = {}  # ref: actor, in the order of submission

    def submit(self, fn, value):
        self._waiting.append((fn, value))
        self._start()

    def push(self, actor):
        self._idle.append(actor)
        self._start()

    def _start(self):
        while self._idle and self._waiting:
            actor, (fn, value) = self._idle.pop(), self._waiting.popleft()
            self._busy[fn(actor, value)] = actor

    def has_next(self) -> bool:
        return bool(self._busy or self._waiting)

    def has_free(self) -> bool:
        return bool(self._idle)

    def pop_idle(self):
        return self._idle.pop() if self._idle else None

    def _take(self, refs, timeout):
        """The value of whichever of refs is ready first. Its actor goes back to work, unless it is dead."""
        if not self.has_next():
            raise StopIteration('No more results to get')
        if not refs:
            waiting = len(self._waiting)
            raise ActorDiedError(f'every actor of the pool is dead, {waiting} values wait: push() another')
        ready, _ = wait(refs, timeout=timeout)
        if not ready:
            raise TimeoutError('Timed out waiting for result')
        actor = self._busy.pop(ready[0])
        try:
            return get(ready[0])
        except ActorDiedError:
            actor = None
            raise
        finally:
            if actor:
                self.push(actor)

    def get_next(self, timeout: float = None):
        """The next result in the order of submission. StopIteration when there is none, TimeoutError."""
        return self._take(list(self._busy)[:1], timeout)

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
    """actors.util, actors.exceptions ...: our names, or Ray's own while Ray is what runs (look them up after
    init)."""
    def __init__(self, path, *things):
        super().__init__(f'actors.{path}')
        self._path, self._table = path, {thing.__name__: thing for thing in things}
        sys.modules[self.__name__] = self

    def __getattr__(self, name):
        if _ray() and not name.startswith('__'):
            return getattr(importlib.import_module(f'ray.{self._path}'), name)
        if name not in self._table:
            raise AttributeError(f"{self.__name__} has no {name!r}; if Ray has it, use backend='ray'")
        return self._table[name]


_kinds = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, RayError)]
exceptions = _Names('exceptions', *_kinds)
actor = _Names('actor', ActorHandle, ActorClass)
util = _Names('util', placement_group, remove_placement_group, ActorPool)
util.scheduling_strategies = _Names('util.scheduling_strategies', PlacementGroupSchedulingStrategy,
                                    NodeAffinitySchedulingStrategy)


# ---- a cluster: the head, a node ---------------------------------------------------------------------------
def _serve_head(host, port, machine):
    """The head of a cluster; never returns. Loopback needs no ceremony, any other address a token of the
    user's own."""
    token = os.environ.get('ACTORS_TOKEN', '')
    if not token and host not in ('127.0.0.1', 'localhost', '::1'):
        raise ValueError(f'--host={host} is open to others: set ACTORS_TOKEN to a secret of 16 characters or '
                         'more (python -c "import secrets; print(secrets.token_hex())")')
    if 0 < len(token) < 16:
        raise ValueError(f'ACTORS_TOKEN has {len(token)} characters: 16 or more')
    made, token = not token, token or secrets.token_hex(16)
    head = _Head(machine, host, port, token)
    file = _token_file(head.address)
    file.unlink(missing_ok=True)
    file.touch(0o600, exist_ok=False)  # a new one, which nobody else holds open
    file.write_text(token)
    shown = f'\ntoken: {token}' if made else ''
    print(f'actors: head at {head.address}, pid {os.getpid()}{shown}', flush=True)
    try:
        head.accept()
    finally:
        head.close()
        file.unlink()


def _serve_node(address, machine):
    """A node of a cluster: starts and ends workers, says every second that it lives. Ends with its head."""
    token, key, (resources, gpus, _) = _find_token(address), secrets.token_bytes(16), machine
    link = _Remote(_connect(address, token), key.hex(), None)
    nursery = _Nursery(None, link.node, address, token)
    link.post('hello', 1, 'node', key, socket.gethostname(), resources, gpus)
    print(f'actors: node {link.node[:8]} of {address}, pid {os.getpid()}, {resources}', flush=True)
    try:
        while link.connection.poll(2 * SILENCE) and nursery.process.poll() is None:
            for operation, _, *args in _receive(link.connection):
                if operation in ('spawn', 'kill'):  # else a heartbeat, or the answer to hello
                    getattr(nursery, operation)(*args)
        raise ValueError(f'the head at {address} is silent for {2 * SILENCE:.0f} s, or the zygote was killed')
    except (EOFError, ConnectionError):
        raise ValueError(f'the head at {address} closed the connection') from None
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
    if sys.argv[1:2] == ['status']:
        print('error: status: that is `ray status`; here, actors.available_resources()', file=sys.stderr)
        sys.exit(2)
    _folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(_folder, 'configurator.py'), encoding='utf-8') as _file:
        exec(_file.read())
    sys.path.insert(0, _folder)
    import actors  # one identity for every class, here as in the workers
    if head == bool(address):
        raise ValueError('--head=True starts a cluster, --address=HOST:PORT joins one: one of the two')
    if address and object_store_memory:
        raise ValueError(f"object_store_memory {object_store_memory}: it is the head's, a node has none")
    _counts = [None if n < 0 else n for n in (num_cpus, num_gpus)]
    _this_machine = actors._machine(*_counts, None, object_store_memory)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if head:
        actors._serve_head(host, port, _this_machine)
    else:
        actors._serve_node(address, _this_machine)
