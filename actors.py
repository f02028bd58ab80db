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
import builtins
import contextvars
import ctypes
import dataclasses
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
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import reduction
from multiprocessing.connection import Connection

import numpy as np

INLINE = 100 << 10        # bytes; a value above it goes through the arena (Ray's limit)
MAX_FRAME = 1 << 38       # bytes; a frame that announces more ends the connection
BEAT, SILENCE = 1.0, 8.0  # seconds between a node's heartbeats; silence after which it is taken for dead
HANDSHAKE = 10            # seconds that a stranger has to prove itself
START = 60.0              # seconds that a worker on another node has to connect
STRANGERS = 64            # handshakes at once; more wait
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
        try:
            both = type(f'RayTaskError({kind.__name__})', (RayTaskError, kind), {'__module__': __name__})
            error = both.__new__(both)
        except TypeError:  # a class that cannot be mixed; the plain error still carries it as .cause
            return self
        error.__dict__.update(vars(self.cause) | vars(self))
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
def _importable(obj):
    """Can another process reach this function or class as module.qualname? If not, it travels by value."""
    module = getattr(obj, '__module__', None)
    if module in (None, '__main__', '__mp_main__') or '<' in obj.__qualname__:
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


def _fill_function(f, state):
    """The second half of unpickling a function: by now it exists, so that what it refers to may refer to
    it."""
    space, attributes, _modules = state
    f.__globals__.update(space)
    for key, value in attributes.items():
        setattr(f, key, value)


# A class that travelled by value keeps one identity in a process: `except MyError` in the script catches what
# a worker raised
_class_keys = weakref.WeakKeyDictionary()  # class: its key; of one that was made here, once it is filled
_classes = weakref.WeakValueDictionary()   # key: class


def _new_class(key, meta, name, bases, first):
    made = _classes.get(key)
    if made is None:
        made = types.new_class(name, bases, {'metaclass': meta}, lambda space: space.update(first))
        _classes[key] = made
    return made


def _fill_class(cls, state):
    key, attributes = state
    if cls not in _class_keys:
        _class_keys[cls] = key
        for name, value in attributes.items():
            type.__setattr__(cls, name, value)


def _cell(cell):
    """A variable of a closure. Its value comes after it, for it may refer to it; functions that share it
    still do."""
    try:
        return types.CellType, (), (None, {'cell_contents': cell.cell_contents})
    except ValueError:  # not bound yet
        return types.CellType, ()


def _named(module, obj):
    """What pickle does not find under its own name, as an attribute of a module. None: it is none."""
    for name, value in vars(module).items():
        if value is obj:
            return getattr, (module, name)


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
    special = type(t) is not torch.Tensor or t.layout != torch.strided or t.is_quantized
    if special or not t.is_cpu or not t.numel():
        return NotImplemented
    flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(raw), t.dtype, tuple(t.shape), t.requires_grad)


_BY_PARTS = {  # type: how to make it again
    np.ndarray: _array,
    types.ModuleType: lambda m: (importlib.import_module, (m.__name__,)),
    types.MappingProxyType: lambda m: (types.MappingProxyType, (dict(m),)),
    types.CodeType: lambda code: (marshal.loads, (marshal.dumps(code),)),
    types.CellType: _cell,
    property: lambda p: (property, (p.fget, p.fset, p.fdel, p.__doc__)),
    classmethod: lambda m: (classmethod, (m.__func__,)),
    staticmethod: lambda m: (staticmethod, (m.__func__,)),
}


class _Packed(pickle.Pickler):
    """A value as bytes: pickle 5 plus what the standard leaves out, functions and classes by value, arrays
    and tensors out of band. The bytes: how many parts and the size of each, then the parts, each on a 64-byte
    boundary: the pickle and its out-of-band buffers. .parts: (offset, bytes) of each, .size: of the whole,
    .contained: the ids of the refs inside, which the runtime counts, .private: it has tensors, which a reader
    may write to."""
    def __init__(self, value):
        file, buffers = io.BytesIO(), []
        super().__init__(file, 5, buffer_callback=buffers.append)
        self.contained, self.spaces = [], {}
        self.dump(value)
        raws = [buffer.raw() for buffer in buffers]
        parts = [file.getvalue(), *raws]
        sizes = [len(part) for part in parts]
        head = struct.pack(f'<{1 + len(sizes)}Q', len(sizes), *sizes)
        *starts, self.size = _starts(sizes)
        self.parts, self.private = [(0, head), *zip(starts, parts)], not all(raw.readonly for raw in raws)

    def join(self):
        blob = bytearray(self.size)
        for at, part in self.parts:
            blob[at:at + len(part)] = part
        return bytes(blob)

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
            return NotImplemented if _importable(obj) else _named(types, obj) or self.by_value(obj)
        if kind is functools._lru_cache_wrapper and not _importable(obj):
            return functools.lru_cache(**obj.cache_parameters()), (obj.__wrapped__,)
        if kind.__module__ == 'dataclasses':  # its markers are compared by identity
            return _named(dataclasses, obj) or NotImplemented
        torch = sys.modules.get('torch')
        if torch and isinstance(obj, torch.Tensor):
            return _flat_tensor(obj, torch)
        return NotImplemented

    def function(self, f):
        space = f.__globals__
        used = {name: space[name] for name in _global_names(f.__code__) if name in space}
        prefixes = tuple(f'{v.__name__}.' for v in used.values() if isinstance(v, types.ModuleType))
        said = set(f.__code__.co_names)
        # `import a.b` binds only a, yet the code says a.b: it is there once this has been unpickled
        modules = [m for name, m in [*sys.modules.items()]
                   if name.startswith(prefixes) and said.issuperset(name.split('.')[1:])]
        # functions of one module share their globals there too: one dict, so one entry in the pickler's memo
        fresh = {'__name__': space.get('__name__'), '__builtins__': builtins}
        shared = self.spaces.setdefault(id(space), fresh)
        kept = '__qualname__', '__doc__', '__defaults__', '__kwdefaults__'
        attributes = {name: getattr(f, name) for name in kept} | f.__dict__
        start = f.__code__, shared, f.__name__, None, f.__closure__
        return types.FunctionType, start, (used, attributes, modules), None, None, _fill_function

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
        return _new_class, start, (key, state), None, None, _fill_class


def _starts(sizes):
    """Where each part begins, and last the end of all. sizes [100, 7] -> [64, 192, 199]"""
    starts, end = [], 8 + 8 * len(sizes)
    for size in sizes:
        starts.append(end + -end % 64)
        end = starts[-1] + size
    return [*starts, end]


def _unpack(blob):
    count, = struct.unpack_from('<Q', blob)
    if count > 1 and isinstance(blob, bytes):
        blob = bytearray(blob)  # a tensor may be written to; an array is read-only by what its pickle says
    sizes = struct.unpack_from(f'<{count}Q', blob, 8)
    view = memoryview(blob)
    data, *buffers = [view[at:at + size] for at, size in zip(_starts(sizes), sizes)]
    return pickle.loads(data, buffers=buffers)


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


class _View(np.ndarray):
    """The bytes of one object. What is read from them keeps the view, the view keeps .ref, the ref keeps the
    object."""


class _Arena:
    """This process's maps of the shared file. A place in it is (offset, size, private); who may write where
    is the runtime's business."""
    def __init__(self, capacity, fd=None):
        self.fd, self.capacity = fd, capacity
        self.written = 0  # the end of what this process has written to
        if not fd:
            if hasattr(os, 'memfd_create'):
                self.fd = os.memfd_create('actors-arena')
            else:  # macOS
                with tempfile.TemporaryFile() as file:
                    self.fd = os.dup(file.fileno())
            os.ftruncate(self.fd, self.capacity)
        self.writing = mmap.mmap(self.fd, self.capacity)
        self.reading = mmap.mmap(self.fd, self.capacity, access=mmap.ACCESS_READ)

    def write(self, place, parts):
        """The first time through the file: pages are neither zeroed nor mapped (2.4 GB/s, 1.3 through the
        map). Later through the map: 2.4 GB/s once, then its pages are there (10 GB/s, 4.7 by the file)."""
        start, size, _ = place
        fresh, self.written = start + size > self.written, max(start + size, self.written)
        for at, part in parts:
            at += start
            if not fresh:
                self.writing[at:at + len(part)] = part
                continue
            while len(part):
                count = os.pwrite(self.fd, part, at)  # at most 2 GB at once
                part, at = part[count:], at + count

    def view(self, place, ref=None):
        """The bytes of a place, without a copy: in the map of the whole arena; if they may be written to, in
        a copy-on-write map of their own."""
        start, size, private = place
        memory = self.reading
        if private:
            memory = mmap.mmap(self.fd, size, access=mmap.ACCESS_COPY, offset=start)
            start = 0
        view = np.frombuffer(memory, np.uint8, size, start).view(_View)
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


# code travels as bytecode: one Python everywhere
_HELLO = (b'actors/3 py%d.%d' % sys.version_info[:2]).ljust(16)


def _open(sock):
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(sock.detach())


def _shake(connection, token, me, other):
    """Both sides prove that they know the token, the client first: a stranger at the port learns nothing.
    -> (what the other side runs, whether it knows the token). Frames of at most 48 bytes; nothing in them is
    interpreted. me, other: b'client', b'server'; a proof that is played back to its author is worth nothing.
    HANDSHAKE seconds in all, however slowly the other side speaks."""
    timer = threading.Timer(HANDSHAKE, _hang_up, [connection])
    timer.start()
    try:
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
    finally:
        timer.cancel()


def _connect(address, token):
    """-> a Connection whose other end knows the token. ConnectionError, AuthenticationError."""
    host, _, port = address.rpartition(':')
    if not port.isdigit():
        raise ValueError(f'address {address!r}: expected HOST:PORT')
    try:
        connection = _open(socket.create_connection((host or '127.0.0.1', port), HANDSHAKE))
        version, known = _shake(connection, token, b'client', b'server')
    except (OSError, EOFError) as e:
        raise ConnectionError(f'no head at {address} ({e}); start one: python actors.py --head=True '
                              f'--port={port}') from None
    if not known:
        raise AuthenticationError(f'{address} ({version.decode()}) refused the token, or this Python '
                                  f'({_HELLO.decode()}): set ACTORS_TOKEN to what the head printed, and use '
                                  'its version')
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
_record = functools.partial(dataclass, eq=False, slots=True)

# What .options() comes to. need: {resource: amount}; strategy: (DEFAULT,), (SPREAD,), (node, id, soft) or
# (group, id, bundle); retries: of a task, an actor's restarts; meta: what handles know of the methods
_Plan = namedtuple('_Plan', 'num_returns need strategy env retries retry_exceptions '
                   'task_retries max_concurrency name get_if_exists meta')
# What a client submits. kind: task, create (an actor) or call (of its method); data: the packed arguments,
# None: they are the first of deps; deps: ids of refs at the arguments' top level; contained: of refs inside;
# returns: of results; actor: its id
_Spec = namedtuple('_Spec', 'id kind name function method data deps contained returns plan actor')
_Lease = namedtuple('_Lease', 'pool need gpus')  # what a worker holds of a node's or a bundle's resources


def _covers(amounts, need):
    return all(amounts.get(k, 0) >= amount - 1e-6 for k, amount in need.items())


class _Resources:
    """What a node, or one bundle of a placement group, has and has free. Each GPU is a resource of its own
    too, by its id, of which a node has 1 (a bundle perhaps less)."""
    def __init__(self, total, gpus):
        self.total, self.gpus = total, list(gpus)
        self.free = Counter(total | gpus)

    def choose(self, need):
        """The GPUs it would give. A share of a GPU goes where it leaves the least over."""
        gpus = need.get('GPU', 0)
        fitting = [gpu for gpu in self.gpus if self.free[gpu] >= min(gpus, 1) - 1e-6]
        return sorted(fitting, key=self.free.get)[:math.ceil(gpus)]

    def fits(self, need):
        return _covers(self.free, need) and len(self.choose(need)) >= need.get('GPU', 0)

    def change(self, need, sign):
        for k, amount in need.items():
            self.free[k] = round(self.free[k] + sign * amount, 6)

    def take(self, need):
        gpus = tuple(self.choose(need))
        need = need | dict.fromkeys(gpus, min(need.get('GPU', 0), 1))
        self.change(need, -1)
        return _Lease(self, need, gpus)


@_record
class _Object:
    refs: int = 1            # of all processes, of objects that hold it, of tasks that need it
    ready: bool = False
    error: bool = False      # the value is an exception
    data: object = None      # the packed value: bytes, or its place in the arena
    contained: tuple = ()    # ids of the refs inside
    waits: dict = field(default_factory=dict)  # the _Waits that look at it, as keys: they keep their order
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
    retries: int             # left; of an actor's creation: its restarts; -1: without end
    parent: bytes = None     # the task that submitted it
    actor: object = None     # the _Actor of a create or call; spec.actor is its id
    peer: object = None      # the worker that has it
    cancelled: bool = False  # or its actor died: the line where it waits drops it

    def __getattr__(self, name):
        return getattr(self.spec, name)


@_record
class _Actor:
    handle: _Object
    create: _Task
    state: str = 'pending'   # then alive, restarting, dead
    peer: object = None
    error: object = None     # why it is dead: an exception, or one that is packed
    wait: _Wait = None       # if the first call of the queue waits for an argument
    queue: deque = field(default_factory=deque)  # calls that have not left yet


@_record
class _Group:
    bundles: dict            # number: {resource: amount}
    strategy: str
    job: bytes
    places: dict             # of a bundle that has one: its node, its own resources, its lease of the node's


@_record
class _Node:
    id: str
    host: str
    resources: _Resources
    peer: object = None      # the node's daemon; None: the runtime's own node
    idle: list = field(default_factory=list)     # workers without a task
    workers: dict = field(default_factory=dict)  # id: worker


class _Peer:
    """Another process as the runtime sees it: a worker, a program elsewhere, a node. A thread reads it,
    another writes to it, neither with the lock: a process that is slow or stopped holds up nobody else."""
    key = actor = lease = None  # of a worker. key: (env, GPU ids)
    request, dead = 0, False    # request: of the message that is being handled

    def __init__(self, role, id, node=None, connection=None):
        self.role, self.id, self.job = role, id, id
        self.node, self.connection = node, connection
        self.outbox, self.heard = queue.SimpleQueue(), time.monotonic()
        self.refs = {}         # id of an object: how often this process refers to it
        self.places = set()    # room in the arena that it was given and has not filled yet
        self.waits = {}        # request: the _Wait of a get or wait in progress
        self.tasks = {}        # id: a task that it has; of an actor: the calls in its process

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

    def refer(self, oid, change):
        obj = self.objects.get(oid)
        if obj:
            obj.refs += change
            if obj.refs <= 0 and obj.ready:
                self.later.append(functools.partial(self.free, oid))

    def free(self, oid):
        obj = self.objects.get(oid)
        if not obj or obj.refs > 0:
            return
        if obj.actor and obj.actor.state != 'dead':
            self.out_of_scope(obj.actor)  # the runtime's
            return
        del self.objects[oid]
        self.space.give(obj.data)
        for inner in obj.contained:
            self.refer(inner, -1)

    def fulfil(self, oid, data, contained=(), error=False):
        obj = self.objects.get(oid)
        if not obj or obj.ready:  # a late result that nobody waits for
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
        self.queues.setdefault(key, deque()).append(task)
        self.changed = True

    def sum(self, which):
        """All nodes' resources: total or free."""
        amounts = Counter()
        for node in self.nodes.values():
            for k in node.resources.total:
                amounts[k] += getattr(node.resources, which)[k]
        return {k: float(round(v, 4)) for k, v in amounts.items() if v > 0}

    def give(self, lease):
        lease.pool.change(lease.need, 1)
        self.changed = True

    def next(self):
        """(task, node, resources to take from) of each task that can start; the caller takes them before the
        next. (task, None, None): it never can."""
        for key, line in list(self.queues.items()):
            while line:
                if line[0].cancelled:
                    line.popleft()
                    continue
                spots, need = self.spots(*key[1]), line[0].plan.need
                fitting = [(None, None)] if spots is None else [spot for spot in spots if spot[1].fits(need)]
                if not fitting:
                    break
                yield line.popleft(), *fitting[0]
            if not line:
                del self.queues[key]

    def spots(self, kind, *where):
        """[(node, resources)] to look at, in this order; None: there never will be one."""
        if kind == 'group':
            key, i = where
            if key not in self.groups:
                return None
            return [place[:2] for j, place in self.groups[key].places.items() if i in (-1, j)]
        nodes = list(self.nodes.values())
        if kind == 'SPREAD':
            nodes.sort(key=lambda node: len(node.workers) - len(node.idle))
        if kind == 'node':
            insisted = [node for node in nodes if node.id == where[0]]
            nodes = insisted + nodes * where[1]  # soft: any other is second best
        return [(node, node.resources) for node in nodes] or None

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
        places, packs = {}, group.strategy == 'PACK'
        missing = group.bundles.keys() - group.places
        for i in sorted(missing, key=lambda i: -sum(group.bundles[i].values())):
            bundle, used = group.bundles[i], [place[0] for place in (group.places | places).values()]
            barred = used if group.strategy == 'STRICT_SPREAD' else ()
            fitting = [node for node in nodes if node not in barred and node.resources.fits(bundle)]
            if not fitting:
                for *_, lease in places.values():
                    lease.pool.change(lease.need, 1)
                return False
            node = min(fitting, key=lambda node: ((node in used) != packs, sum(node.resources.free.values())))
            lease = node.resources.take(bundle)
            places[i] = node, _Resources(bundle, {gpu: lease.need[gpu] for gpu in lease.gpus}), lease
        group.places |= places
        return True


# ---- the runtime: tasks, actors, workers -------------------------------------------------------------------
_LATER = object()  # the answer comes when it is there
_NEVER = {'node': (TaskUnschedulableError, ActorUnschedulableError, 'its node is gone, and soft=False'),
          'group': (TaskPlacementGroupRemoved, ActorPlacementGroupRemoved, 'its placement group was removed')}


class _Desk(_Directory):
    """Where messages arrive: all state, one lock. on_<operation>(peer, ...) runs under it, for the driver in
    its own thread, for the others in the threads that read them; what it returns is the answer. Here: what is
    asked about objects."""
    def __init__(self, resources, gpus, capacity):
        super().__init__(capacity)
        self.lock, self.closed, self.scheduler = threading.RLock(), False, _Scheduler()
        self.home = _Node(secrets.token_hex(16), '127.0.0.1', _Resources(resources, gpus))
        self.scheduler.nodes[self.home.id] = self.home
        # the driver that this is a part of, and (id, +1 or -1) of its refs that came and went
        self.inner, self.events = _Peer('inner', secrets.token_bytes(8), self.home), deque()

    def handle(self, peer, message):
        operation, request, *args = message
        with self.lock:
            if self.closed or peer.dead:
                return
            self.drain()
            peer.request = request
            try:
                answer = getattr(self, 'on_' + operation)(peer, *args)
            except (RayError, ValueError) as e:
                if not request:
                    raise
                answer = e
            if request and answer is not _LATER:
                peer.send('reply', request, answer)
            self.settle()

    def drain(self):
        """The driver's refs that went since last asked may be all the room there is."""
        while self.events:
            self.hold(self.inner, *self.events.popleft())
        self.settle()

    def settle(self):
        """What the last message made possible."""
        later = self.later
        while later or self.scheduler.changed:
            if later:
                later.popleft()()
                continue
            self.scheduler.changed = False
            for key, group in self.scheduler.groups.items():
                if len(group.places) < len(group.bundles) and self.scheduler.place(group):
                    self.fulfil(key, _Packed(True).join())
            for task, node, resources in self.scheduler.next():
                self.start(task, node, resources)

    def hold(self, peer, oid, change):
        """Counted for the process too: when it dies, its refs go."""
        count = peer.refs.pop(oid, 0) + change
        if count:
            peer.refs[oid] = count
        self.refer(oid, change)

    def add(self, peer, oid):
        """A new object, with one ref: the process's that asked."""
        peer.refs[oid] = 1
        obj = self.objects[oid] = _Object()
        return obj

    def on_refs(self, peer, events):
        for oid, change in events:
            self.hold(peer, oid, change)

    def on_room(self, peer, size, private, data):
        """A place in the arena; a process that has no part in it sends the bytes along."""
        place = self.space.take(size), size, private
        if data:
            self.arena.write(place, [(0, data)])
        peer.places.add(place)
        return place

    def on_put(self, peer, oid, data, contained):
        self.add(peer, oid)
        self.deliver(peer, oid, data, contained)

    def deliver(self, peer, oid, data, contained):
        if isinstance(data, tuple):
            peer.places.remove(data)  # it is the object's from now on
        self.fulfil(oid, data, contained)

    def answer_when(self, peer, oids, spare, answer):
        request = peer.request

        def then():
            if request in peer.waits:  # else it waits no longer
                self.on_drop(peer, request)
                peer.send('reply', request, answer())
        wait = self.watch(oids, spare, then)
        if not wait:
            return answer()
        peer.waits[request] = wait
        self.lend(peer, 1)
        return _LATER

    def values(self, oids, peer):
        """[(id, is it an error, data)]; a process that has no part in the arena gets bytes."""
        values = []
        for oid in oids:
            obj = self.objects[oid]
            apart = isinstance(obj.data, tuple) and peer.node is not self.home
            values.append((oid, obj.error, bytes(self.arena.view(obj.data)) if apart else obj.data))
        return values

    def on_get(self, peer, oids):
        return self.answer_when(peer, oids, 0, lambda: self.values(oids, peer))

    def on_wait(self, peer, oids, count, spare):
        """The ids of the first `count` that are ready, once all but `spare` are."""
        def done():
            ready = [oid for oid in oids if self.objects[oid].ready]
            return set(ready[:count])
        return self.answer_when(peer, oids, spare, done)

    def on_drop(self, peer, request):
        if request in peer.waits:
            self.lend(peer, -1)
            self.unwatch(peer.waits.pop(request))

    def lend(self, peer, sign):
        """A worker that waits, once or several times, lends its CPUs, or nested tasks would wait for each
        other for ever. They are taken back even if that overdraws."""
        if peer.lease and len(peer.waits) == 1:
            peer.lease.pool.free['CPU'] += sign * peer.lease.need.get('CPU', 0)
            self.scheduler.changed = True

    def on_info(self, peer, what):
        if what == 'nodes':
            return [dict(NodeID=node.id, Alive=True, NodeManagerAddress=node.host,
                         NodeManagerHostname=node.host, Resources=node.resources.total)
                    for node in self.scheduler.nodes.values()]
        space, amounts = self.space, self.scheduler.sum(what)
        amounts['object_store_memory'] = float(space.capacity - (space.used() if what == 'free' else 0))
        return amounts


class _Runtime(_Desk):
    """The life of tasks, actors and workers."""
    def __init__(self, *machine):
        super().__init__(*machine)
        self.tasks, self.names, self.peers = {}, {}, {}
        self.nursery = _Nursery(self.arena, self.home.id)
        _thread(self.tick)

    # -- tasks
    def admit(self, peer, spec):
        task = self.tasks[spec.id] = _Task(spec, peer.job, spec.plan.retries)
        for oid in (*spec.deps, *spec.contained):
            self.refer(oid, 1)
        for oid in spec.returns:
            self.add(peer, oid)
        return task

    def on_submit(self, peer, spec):
        task = self.admit(peer, spec)
        task.parent = None if peer.actor else next(iter(peer.tasks), None)
        if spec.kind == 'task':
            self.enqueue(task)
            return
        actor = task.actor = self.objects[spec.actor].actor  # there: the caller has a handle
        if actor.state == 'dead':
            self.fail(task, actor.error)
            return
        task.retries = actor.create.plan.task_retries
        actor.queue.append(task)
        self.pump(actor)

    def failed_argument(self, task):
        """Whether an argument's value is an error; then the task ends with it."""
        wrong = [oid for oid in task.deps if self.objects[oid].error]
        if wrong and task.kind == 'create':
            self.bury(task.actor, 'an argument of its constructor could not be computed')
        elif wrong:
            self.fail(task, self.objects[wrong[0]].data)
        return bool(wrong)

    def enqueue(self, task):
        """To the scheduler, once its arguments exist."""
        if task.id not in self.tasks or self.watch(task.deps, 0, lambda: self.enqueue(task)):
            return
        if not self.failed_argument(task):
            self.scheduler.add(task)

    def start(self, task, node, resources):
        plan = task.plan
        if not node:
            task_error, actor_error, words = _NEVER[plan.strategy[0]]
            self.fail(task, (actor_error if task.actor else task_error)(f'{task.name}: {words}'))
            return
        lease = resources.take(plan.need)
        key = plan.env, lease.gpus
        peer = next((idle for idle in node.idle if idle.key == key), None)
        if peer:
            node.idle.remove(peer)
        else:
            peer = self.spawn(node, *key)
        peer.lease, peer.job = lease, task.job
        if task.actor:
            task.actor.peer, peer.actor = peer, task.actor
        self.run_on(task, peer)

    def run_on(self, task, peer):
        task.peer, peer.tasks[task.id] = peer, task
        peer.send('run', task.spec, self.values(task.deps, peer))

    def pump(self, actor):
        """Calls leave in the order they came; the first whose arguments are not there yet holds up the
        rest."""
        if actor.wait:
            self.unwatch(actor.wait)
        while actor.queue and actor.state == 'alive':
            task = actor.queue[0]
            actor.wait = None if task.cancelled else self.watch(task.deps, 0, lambda: self.pump(actor))
            if actor.wait:
                return
            actor.queue.popleft()
            if not task.cancelled and not self.failed_argument(task):
                self.run_on(task, actor.peer)
        self.out_of_scope(actor)

    def on_done(self, peer, tid, results):
        task = peer.tasks[tid]
        for oid, result in zip(task.returns, results):
            self.deliver(peer, oid, *result)
        if task.kind == 'create':
            task.actor.state = 'alive'
            self.pump(task.actor)
        self.finish(task)
        if not task.actor:
            self.release(peer)

    def on_fail(self, peer, tid, retry, error):
        task = peer.tasks[tid]
        if not (retry and self.again(task)):
            self.fail(task, error)
        if not task.actor:
            self.release(peer)

    def again(self, task):
        """Whether it may be tried once more; then it is."""
        if task.cancelled or not task.retries:
            return False
        task.peer.tasks.pop(task.id, None)
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
            self.fulfil(oid, data, error=True)
        self.finish(task)

    def finish(self, task):
        """The task is over: what it held goes. An actor's creation keeps its arguments as long as it may be
        repeated."""
        if task.peer:
            task.peer.tasks.pop(task.id, None)
        alive = task.kind == 'create' and task.actor.state != 'dead'
        if not alive and self.tasks.pop(task.id, None):
            for oid in (*task.deps, *task.contained):
                self.refer(oid, -1)
        if task.actor:
            self.out_of_scope(task.actor)

    def on_cancel(self, peer, tid, force, recursive):
        """What waits is dropped. The process of a task that runs is killed; an actor's call that runs goes
        on."""
        task = self.tasks.get(tid)
        if not task:
            return
        if task.actor and force:
            raise ValueError('force=True is not supported for actor tasks: use actors.kill')
        task.cancelled = True
        for child in [t.id for t in self.tasks.values() if recursive and t.parent == tid]:
            self.on_cancel(peer, child, False, True)
        if task.peer is None:
            self.fail(task, TaskCancelledError(f'{task.name} was cancelled before it ran'))
            if task.actor:
                self.pump(task.actor)
        elif task.actor:
            task.peer.send('cancel', tid)  # it may still be in the worker's queue
        else:
            self.end(task.peer, TaskCancelledError(f'{task.name} was cancelled while it ran'), True)

    # -- actors
    def on_create(self, peer, spec):
        name, plan = spec.plan.name, spec.plan
        if name in self.names and plan.get_if_exists:
            return self.on_get_actor(peer, name)
        if name in self.names:
            raise ActorAlreadyExistsError(f'name {name!r} is taken: get_actor(), or get_if_exists=True')
        handle = self.add(peer, spec.actor)
        handle.ready = True
        task = self.admit(peer, spec)
        handle.actor = task.actor = _Actor(handle, task)
        if name:
            self.names[name] = task.actor
        self.enqueue(task)
        return spec.actor, plan.meta

    def on_get_actor(self, peer, name):
        if name not in self.names:
            raise ValueError(f'Failed to look up actor with name {name!r}: never created, or dead')
        spec = self.names[name].create.spec
        self.hold(peer, spec.actor, 1)
        return spec.actor, spec.plan.meta

    def on_kill(self, peer, aid, no_restart):
        self.end_actor(self.objects[aid].actor, 'it was killed by actors.kill', no_restart)

    def end_actor(self, actor, why, final):
        """final=False: as if it had crashed."""
        if actor.peer:
            self.end(actor.peer, why, final)
        elif actor.state != 'dead' and final:
            self.bury(actor, why)

    def bury(self, actor, why):
        """why: words, or an error that is packed."""
        error = why if isinstance(why, bytes) else ActorDiedError(
            f'{actor.create.name}: the actor is dead: {why}')
        actor.state, actor.error = 'dead', error
        self.names.pop(actor.create.plan.name, None)
        if actor.peer:
            actor.queue.extend(actor.peer.tasks.values())
            actor.peer.send('exit')
        while actor.queue:
            self.fail(actor.queue.popleft(), error)
        actor.create.cancelled = True
        self.finish(actor.create)
        self.refer(actor.create.spec.actor, 0)

    def out_of_scope(self, actor):
        """The actor goes if no handle is left anywhere and nothing is to be done."""
        idle = actor.state == 'alive' and not actor.queue and not actor.peer.tasks
        if idle and actor.handle.refs <= 0:
            self.bury(actor, 'its last handle went out of scope')

    # -- workers
    def spawn(self, node, pairs, gpus):
        peer = _Peer('worker', secrets.token_bytes(8), node)
        self.peers[peer.id] = node.workers[peer.id] = peer
        peer.key, env = (pairs, gpus), dict(pairs)
        if gpus:
            env['CUDA_VISIBLE_DEVICES'] = env['ACTORS_GPUS'] = ','.join(gpus)
        if node.peer:
            node.peer.send('spawn', peer.id, env)
            return peer
        if self.nursery.process.poll() is not None:  # it was killed; its workers see that, and go
            self.nursery = _Nursery(self.arena, self.home.id)
        peer.connection = self.nursery.spawn(peer.id, env)
        _thread(peer.serve, self)
        return peer

    def release(self, peer):
        """A task's worker is free for the next task of its kind. It goes home if more wait idle than there
        are CPUs, if a thread of the task still waits for something, and if it had a GPU: a process that lives
        may hold the GPU's memory. What it held is free when it is gone."""
        node, lease = peer.node, peer.lease
        if lease.gpus or peer.waits or len(node.idle) > max(2, node.resources.total.get('CPU', 0)):
            peer.send('exit')
            return
        self.scheduler.give(lease)
        peer.lease = None
        node.idle.append(peer)

    def lost(self, peer, why):
        with self.lock:
            if not self.closed:
                self.end(peer, why)
                self.settle()

    def end(self, peer, why, final=False):
        """A process is gone, or is to go. Everything it held, ran or was ends by Ray's rules. why: words;
        final: without retries and restarts, and why is the error of its task."""
        if peer.dead:
            return
        peer.dead = True
        peer.send('exit')  # wakes the thread that writes
        if peer.connection:
            _hang_up(peer.connection)
        self.peers.pop(peer.id, None)
        for request in list(peer.waits):
            self.on_drop(peer, request)
        for place in peer.places:
            self.space.give(place)
        for oid, count in peer.refs.items():
            self.refer(oid, -count)
        if peer.lease:
            self.scheduler.give(peer.lease)
        getattr(self, peer.role + '_down')(peer, why, final)

    def worker_down(self, peer, why, final):
        node = peer.node
        del node.workers[peer.id]
        if peer in node.idle:
            node.idle.remove(peer)
        if node.peer:
            node.peer.send('kill', peer.id)
        else:
            self.nursery.kill(peer.id)
        actor = peer.actor
        if actor and actor.state != 'dead':
            if final or not self.again(actor.create):
                self.bury(actor, why)
            else:
                actor.peer, actor.state = None, 'restarting'
        for task in reversed(list(peer.tasks.values())):
            error = WorkerCrashedError(f'the worker of {task.name} died ({why}) and no retry is left; '
                                       'max_retries allows more')
            if actor:
                error = ActorUnavailableError(f'{task.name}: the actor died in this call ({why}) and is '
                                              'restarting; it may have run')
            if final or not self.again(task):
                self.fail(task, why if final else error)

    def driver_down(self, peer, *_):
        """A program is gone: its tasks, actors and groups go too."""
        for task in [task for task in self.tasks.values() if task.job == peer.id]:
            if task.kind == 'create':
                self.end_actor(task.actor, 'its program ended', True)
            elif task.kind == 'task':
                self.on_cancel(peer, task.id, False, False)
        for key in [key for key, group in self.scheduler.groups.items() if group.job == peer.id]:
            self.on_remove_group(peer, key)

    # -- placement groups
    def on_group(self, peer, key, bundles, strategy):
        """key: the group's, and that of the object that is there once every bundle has its place."""
        self.add(peer, key)
        self.scheduler.groups[key] = _Group(dict(enumerate(bundles)), strategy, peer.job, {})
        self.scheduler.changed = True

    def on_remove_group(self, peer, key):
        group = self.scheduler.groups.pop(key, None)
        if not group:
            return
        removed = TaskPlacementGroupRemoved('its placement group was removed')
        for node, resources, lease in group.places.values():
            for worker in list(node.workers.values()):
                if worker.lease and worker.lease.pool is resources:
                    self.end(worker, removed, True)
            self.scheduler.give(lease)
        self.fulfil(key, _Packed(removed).join(), error=True)

    # -- nodes
    def tick(self):
        while not self.closed:
            time.sleep(BEAT)
            with self.lock:
                self.drain()
                for peer in list(self.peers.values()):
                    if peer.connection and peer.role != 'node':  # its end tells
                        continue
                    limit = SILENCE if peer.role == 'node' else START
                    if time.monotonic() - peer.heard > limit:
                        self.lost(peer, f'no sign of life for {limit:.0f} s')

    def node_down(self, peer, why, _):
        node = peer.node
        print(f'actors: node {node.id[:8]} ({node.host}) is lost: {why}', file=sys.stderr)
        del self.scheduler.nodes[node.id]
        for group in self.scheduler.groups.values():
            group.places = {i: place for i, place in group.places.items() if place[0] is not node}
        for worker in list(node.workers.values()):
            self.end(worker, 'its node was lost')

    def close(self):
        with self.lock:
            self.closed = True
        self.nursery.close()  # the workers end with it
        self.arena.close()


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
            self.strangers.acquire()
            sock, _ = self.port.accept()
            _thread(self.greet, sock)

    def greet(self, sock):
        peer = None
        with suppress(Exception):  # noise, or one of us that speaks out of turn: it is not answered
            connection = _open(sock)
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
    is_worker = False
    birth = error = None  # birth: the _Spec of the actor that this process is

    def __init__(self, node, arena):
        self.node, self.arena = node, arena
        self.prefix, self.count = secrets.token_bytes(8), itertools.count(1)
        self.boxes, self.exported = {}, {}  # boxes: request -> where its answer is put
        self.events = deque()  # (id, +1 or -1) of refs that came and went here; __del__ only appends to it,
                               # for it may run anywhere, under any lock

    def new_id(self):
        return self.prefix + next(self.count).to_bytes(6, 'big')

    def call(self, operation, *args, timeout=None):
        request, box = next(self.count), queue.SimpleQueue()
        self.boxes[request] = box
        self.post(operation, request, *args)
        if self.error:
            raise self.error
        try:
            answer = box.get(timeout=timeout)
        except queue.Empty:
            if self.boxes.pop(request, None):
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

    def load(self, oid, failed, data):
        """The value; an error is raised."""
        try:
            value = _unpack(data if isinstance(data, bytes) else self.arena.view(data, ObjectRef(oid)))
        except Exception as e:
            raise RaySystemError(f'the value of {oid.hex()} cannot be read here: '
                                 f'{type(e).__name__}: {e}') from e
        if failed:
            raise value.as_instanceof_cause() if isinstance(value, RayTaskError) else value
        return value

    def get(self, refs, timeout):
        answer = self.call('get', [ref._valid_id() for ref in refs], timeout=timeout)
        return [self.load(*loadable) for loadable in answer]

    def wait(self, refs, count, timeout):
        oids = [ref._valid_id() for ref in refs]
        try:
            done = self.call('wait', oids, count, len(oids) - count, timeout=timeout)
        except GetTimeoutError:
            done = self.call('wait', oids, count, len(oids))
        return [ref for ref in refs if ref._id in done], [ref for ref in refs if ref._id not in done]

    def export(self, obj):
        """The ref under which workers find a function or class; put once in a session."""
        if obj not in self.exported:
            self.exported[obj] = self.put(_Packed(obj))
        return self.exported[obj]._id

    def submit(self, kind, name, signature, plan, function, method, actor, /, *args, **kwargs):
        """-> the refs of the results, or a new actor's handle. Refs at the arguments' top level become
        dependencies; large arguments are put first."""
        signature.bind(*args, **kwargs)  # TypeError says what is wrong
        values = [*args, *kwargs.values()]
        deps = [value._valid_id() for value in values if type(value) is ObjectRef]
        values = [_Arg if type(value) is ObjectRef else value for value in values]
        try:
            packed = _Packed((values, list(kwargs)))
        except Exception as e:
            e.add_note(f'The arguments of {name} could not be serialized.')
            raise
        data, contained = None, packed.contained + ([function] if function else [])
        if packed.size <= INLINE:
            data = packed.join()
        else:
            kept = self.put(packed)  # it must live until the task is sent
            deps.insert(0, kept._id)
        task = self.new_id()
        returns = [task + i.to_bytes(2, 'big') for i in range(plan.num_returns)]
        if kind == 'create':
            actor = task + b'\xfe\xff'
        spec = _Spec(task, kind, name, function, method, data, deps, contained, returns, plan, actor)
        if kind == 'create':
            return _handle(*self.call('create', spec))
        self.post('submit', 0, spec)
        refs = [ObjectRef(oid, True) for oid in returns]
        return refs[0] if len(refs) == 1 else refs or None


class _Direct(_Session):
    """The session of a driver whose runtime is threads of this process: a message is a function call."""
    def __init__(self, runtime):
        super().__init__(runtime.home.id, runtime.arena)
        self.runtime, self.events = runtime, runtime.events
        runtime.inner.send = lambda _, request, answer: self.answered(request, answer)

    def post(self, *message):
        self.runtime.handle(self.runtime.inner, message)

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
            events = [self.events.popleft() for _ in range(len(self.events))]
            try:
                _send(self.connection, [('refs', 0, events), message] if events else [message])
            except OSError as e:
                self.broken(RaySystemError(f'the head is gone: {e}'))

    def tell(self):
        """Once a second: that this process lives, and the refs that went while nothing else was said. It is
        answered, so that a node hears that its head lives."""
        parent = os.getppid()
        while not self.error:
            time.sleep(BEAT)
            self.post('refs', -1, [])
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
_running = contextvars.ContextVar('actors_running', default=None)  # the _Spec of what runs here


class _Worker:
    """One process that runs tasks one after the other, or is one actor. A thread reads and only sorts; the
    main thread runs user code."""
    actor = pool = None

    def __init__(self, session):
        self.session, self.jobs = session, queue.SimpleQueue()
        self.dropped = set()  # cancelled before they began
        _thread(self.sort)

    def sort(self):
        for message in self.session.read():
            if message[0] == 'cancel':
                self.dropped.add(message[1])
            else:
                self.jobs.put(message)
        _leave()  # the runtime is gone: nobody wants what is running here

    def serve(self):
        while (message := self.jobs.get())[0] == 'run':
            if self.pool:
                self.pool.submit(self.run, *message[1:])
            else:
                self.run(*message[1:])
        _leave()

    def prepare(self, spec, values):
        """-> the function and its arguments."""
        if spec.id in self.dropped:
            raise TaskCancelledError(f'{spec.name} was cancelled before it ran')
        loaded = itertools.starmap(self.session.load, values)
        args, names = next(loaded) if spec.data is None else _unpack(spec.data)
        args = [next(loaded) if arg is _Arg else arg for arg in args]
        count = len(args) - len(names)
        f = getattr(self.actor, spec.method) if spec.method else self.function(spec.function)
        return f, args[:count], dict(zip(names, args[count:]))

    @functools.cache
    def function(self, oid):
        return self.session.get([ObjectRef(oid)], None)[0]

    def run(self, spec, values):
        _running.set(spec)
        if spec.kind == 'create':
            self.session.birth = spec
        try:
            f, args, kwargs = self.prepare(spec, values)
            result = f(*args, **kwargs)
            del args, kwargs  # the refs in them go before the result is told
            if spec.kind == 'create':
                self.actor, result = result, None
                if spec.plan.max_concurrency > 1:
                    self.pool = futures.ThreadPoolExecutor(spec.plan.max_concurrency)
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
        e.__traceback__ = e.__traceback__.tb_next  # the first frame is ours
        text = ''.join(traceback.format_exception(e)).rstrip()
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

    def spawn(self, worker, env):
        """-> the worker's connection. Nobody speaks through it if the worker is to dial the head."""
        modules = [module for module in PRELOAD if module in sys.modules]
        ours, theirs = socket.socketpair()
        with theirs, suppress(OSError):  # the zygote died: whoever asks next makes another
            self.link.send((worker, modules, env, sys.path, *self.about))
            reduction.send_handle(self.link, theirs.fileno(), None)
        return Connection(ours.detach())

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
    _worker, then the worker's socket; or (id,) to kill one."""
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
            sock = reduction.recv_handle(link) if order else None
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
            os.close(sock)
            continue
        try:
            os.setpgrp()  # its children are of its group, and end with it
            link.close()
            _worker(sock, arena_fd and _Arena(capacity, arena_fd), worker, *order)
        except BaseException:
            traceback.print_exc()
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
        sys.modules['torch'].set_num_threads(int(env['OMP_NUM_THREADS']))
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
    started = hasattr(ray, 'is_initialized') and ray.is_initialized()
    return ray if started and _session is None else None


def _here():
    if not _session:
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
    machine = dict(num_cpus=num_cpus, num_gpus=num_gpus, resources=resources,
                   object_store_memory=object_store_memory)
    given = {k: v for k, v in machine.items() if v is not None}
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
    if _session and not _session.is_worker:  # a worker's session is its process
        session, _session = _session, None
        session.broken(RaySystemError('actors.shutdown() was called'))
        session.close()
    elif _ray():
        _ray().shutdown()


def is_initialized() -> bool:
    return bool(_session or _ray())


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
        if not _session:
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
    if namespace:
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
    """What the task or actor that asks was given of GPUs; a driver has none."""
    return [gpu for gpu in os.environ.get('ACTORS_GPUS', '').split(',') if gpu]


@_or_ray
def get_runtime_context():
    return _Context()


class _Context:
    """What runs here: ids as hex, None outside of a task or an actor."""
    def __init__(self):
        task, birth = _running.get(), _here().birth
        self._known = {'get_task_id': task and task.id.hex(),
                       'get_actor_id': birth and birth.actor.hex(),
                       'get_actor_name': birth and (birth.plan.name or ''),
                       'get_node_id': _session.node,
                       'get_accelerator_ids': {'GPU': get_gpu_ids()}}

    def __getattr__(self, name):
        if name not in self._known:
            raise AttributeError(f"the runtime context has no {name}; Ray's own may, use backend='ray'")
        return lambda: self._known[name]


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


def _check_options(options, known):
    for key, value in options.items():
        if key not in known and not _ray():  # Ray says what it knows itself
            raise ValueError(f"Invalid option keyword {key}: expected {', '.join(known)}; if Ray honours it, "
                             "init(backend='ray') first")
        numeric = key in ('num_cpus', 'num_gpus', 'num_returns')
        if numeric and value is not None and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f'The quantity of {key} cannot be negative or no number: got {value!r}')


def _plan(options, name, default_cpus):
    """What the options come to here. default_cpus: 1 of a task, 0 of an actor or its method."""
    given = types.SimpleNamespace(**_TASK | _ACTOR | options)
    cpus, gpus, runtime_env = given.num_cpus, given.num_gpus, given.runtime_env or {}
    if set(runtime_env) - {'env_vars'}:
        raise ValueError(f"{name}: runtime_env {runtime_env}: all but env_vars needs backend='ray'")
    if gpus > 1 and gpus % 1:
        raise ValueError(f'num_gpus {gpus}: a share below 1, or whole GPUs')
    threads = str(max(1, int(cpus or default_cpus)))  # Ray's rule: as many as CPUs
    if cpus is None:
        cpus, threads = default_cpus, os.environ.get('OMP_NUM_THREADS', threads)
    need = {'CPU': cpus, 'GPU': gpus, **(given.resources or {})}
    need = {k: v for k, v in need.items() if v}
    strategy = _strategy(given.scheduling_strategy, need, name)
    env = {'OMP_NUM_THREADS': threads, **runtime_env.get('env_vars', {})}
    pairs = tuple(sorted((k, str(v)) for k, v in env.items()))
    retry, retries = given.retry_exceptions, given.max_retries if default_cpus else given.max_restarts
    if not isinstance(retry, bool):
        retry = _Packed(tuple(retry)).join()
    return _Plan(int(given.num_returns), need, strategy, pairs, retries, retry, given.max_task_retries,
                 given.max_concurrency or 1, given.name, given.get_if_exists, None)


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
    _check_options(options, ['num_returns'])

    def mark(f):
        f._actors_method = options
        return f
    return mark


def remote(target=None, /, **options):
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
    return wrap if target is None else wrap(target)


class _Remotable:
    """A function or class with options; what both have in common."""
    def __init__(self, target, options):
        _check_options(options, self._known)
        functools.update_wrapper(self, target, updated=())
        self._target, self._options, self._ready = target, options, (None, None)

    def __reduce__(self):
        return type(self), (self._target, self._options)

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{self.__name__} cannot be called directly, as with {args} {kwargs}: try "
                        f"'{self.__name__}.remote()'")

    def options(self, **options):
        return type(self)(self._target, {**self._options, **options})

    def remote(self, *args, **kwargs):
        ray = _ray()
        session = ray or _here()
        if self._ready[0] is not session:
            self._ready = session, self._on_ray(ray) if ray else self._on_ours(session)
        return self._ready[1](*args, **kwargs)

    def _on_ours(self, session):
        function = session.export(self._target)
        return functools.partial(session.submit, *self._shape(), function, None, None)

    def _on_ray(self, ray):
        return ray.remote(self._target).options(**self._options).remote


class RemoteFunction(_Remotable):
    _known = _TASK

    def _shape(self):
        plan = _plan(self._options, self.__name__, 1)
        return 'task', plan.name or self.__qualname__, inspect.signature(self._target), plan


class ActorClass(_Remotable):
    _known = _ACTOR

    def _methods(self):
        return inspect.getmembers(self._target, lambda m: inspect.isfunction(m) or inspect.ismethod(m))

    def _on_ray(self, ray):
        for _, m in self._methods():
            if hasattr(m, '_actors_method'):
                ray.method(**m._actors_method)(m)
        return super()._on_ray(ray)

    def _shape(self):
        shapes = {}
        for name, m in self._methods():
            if inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m):
                raise ValueError(f"{self.__name__}.{name} is a coroutine: that needs backend='ray'; here use "
                                 'plain methods, with max_concurrency=n for n at once')
            bound = isinstance(inspect.getattr_static(self._target, name), (staticmethod, classmethod))
            plan = _plan(getattr(m, '_actors_method', {}), name, 0)
            shapes[name] = _signature(m, 0 if bound else 1), plan
        init = self._target.__init__
        signature = inspect.Signature() if init is object.__init__ else _signature(init, 1)
        meta = pickle.dumps((self.__name__, shapes), 5)
        plan = _plan(self._options, self.__name__, 0)._replace(num_returns=0, meta=meta)
        return 'create', self.__name__, signature, plan


@_record
class ActorMethod:
    _handle: object
    _name: str
    _signature: object
    _plan: _Plan

    def options(self, **options):
        _check_options(options, ['num_returns'])
        return ActorMethod(self._handle, self._name, self._signature, self._plan._replace(**options))

    def remote(self, *args, **kwargs):
        name = f'{self._handle._class_name}.{self._name}'
        actor = self._handle._ref._valid_id()
        return _here().submit('call', name, self._signature, self._plan, None, self._name, actor,
                              *args, **kwargs)


@dataclass(unsafe_hash=True, repr=False)
class ActorHandle:
    """Calls of one process run in the order they were made (max_concurrency=1). The last handle gone, the
    actor ends."""
    _ref: ObjectRef
    _meta: bytes

    def __post_init__(self):
        self._class_name, self._methods = pickle.loads(self._meta)

    def __getattr__(self, name):
        if name not in self._methods:
            raise AttributeError(f'actor {self._class_name} has no method {name!r}')
        return ActorMethod(self, name, *self._methods[name])

    def __reduce__(self):
        return ActorHandle, (self._ref, self._meta)

    def __repr__(self):
        return f'Actor({self._class_name}, {self._ref.hex()})'


def _handle(actor, meta):
    return ActorHandle(ObjectRef(actor, True), meta)


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


@dataclass
class PlacementGroupSchedulingStrategy:
    placement_group: PlacementGroup
    placement_group_bundle_index: int = -1
    placement_group_capture_child_tasks: bool = None

    def __post_init__(self):
        if self.placement_group_capture_child_tasks:
            raise ValueError('placement_group_capture_child_tasks: give children their own strategy')


@dataclass
class NodeAffinitySchedulingStrategy:
    node_id: str
    soft: bool


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

    def map(self, fn, values, *, _take=None):
        for value in values:
            self.submit(fn, value)
        while self.has_next():
            yield (_take or self.get_next)()

    def map_unordered(self, fn, values):
        return self.map(fn, values, _take=self.get_next_unordered)


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
    shown = ''
    if not token:
        token = secrets.token_hex(16)
        shown = f'\ntoken: {token}'
    head = _Head(machine, host, port, token)
    file = _token_file(head.address)
    file.unlink(missing_ok=True)
    file.touch(0o600, exist_ok=False)  # a new one, which nobody else holds open
    file.write_text(token)
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
    reason = f'is silent for {2 * SILENCE:.0f} s, or the zygote was killed'
    try:
        while link.connection.poll(2 * SILENCE) and nursery.process.poll() is None:
            for operation, *args in _receive(link.connection):
                if operation in ('spawn', 'kill'):  # else a reply
                    getattr(nursery, operation)(*args)
    except (EOFError, ConnectionError):
        reason = 'closed the connection'
    finally:
        nursery.close()
    raise ValueError(f'the head at {address} {reason}')


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
