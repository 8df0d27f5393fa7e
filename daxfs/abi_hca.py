"""The calls of the simulated RDMA adapter (HCA): what goes in and out of `abi.IOC_HCA`. Client and daemon share this module.

A context belongs to an open file description of a directory of the mount (its root, usually): `OPEN` makes it, the last
close ends it and all that was made through it. Every call but `REG_MR` goes through that descriptor. `REG_MR` goes through
the descriptor of a file, names a pin of that descriptor, and the context by the secret that `OPEN` returned: whoever has
both descriptors may join them. From then on the pin is the region's.

Each call is one IOC_HCA of PAGE_BYTES in both directions: a HEAD, then what the table says. Structures are little-endian,
without padding. Numbers of operations, states, flags and statuses are those of <infiniband/verbs.h>.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

from daxfs import abi

HEAD = Struct("<II")  # operation, zero
ROOM = abi.PAGE_BYTES - HEAD.size  # bytes behind the head

INFINITE = 0xFFFF_FFFF  # milliseconds


class Op(IntEnum):
    OPEN = 1  # out: DEVICE. Errors: ENOTDIR, EEXIST (it is one already), ENOMEM
    ALLOC_PD = 2  # out: HANDLE
    DEALLOC_PD = 3  # in: HANDLE. EBUSY while something is in it
    REG_MR = 4  # in: REG_MR, out: MR. On a file. EINVAL, ENOENT (no such pin), EACCES, EBUSY (the pin is in use), ENOMEM
    DEREG_MR = 5  # in: HANDLE. Gives the pin back
    LOAD = 6  # in: ACCESS, out: the bytes. What the owner of a region reads from it, at most ROOM. EFAULT, EACCES, EINVAL
    STORE = 7  # in: ACCESS, then the bytes
    CREATE_CQ = 8  # in: CQ, out: HANDLE
    DESTROY_CQ = 9  # in: HANDLE. EBUSY while a QP uses it
    POLL_CQ = 10  # in: POLL, out: COUNT, then as many WC. EOVERFLOW once the queue has overrun
    CREATE_QP = 11  # in: CREATE_QP, out: QP
    MODIFY_QP = 12  # in: MODIFY_QP. EINVAL for a transition that there is not
    QUERY_QP = 13  # in: HANDLE, out: QUERY_QP
    DESTROY_QP = 14  # in: HANDLE
    POST_SEND = 15  # in: POST, then as many SEND_WR with their SGEs, out: COUNT (how many were taken)
    POST_RECV = 16  # in: POST, then as many RECV_WR with their SGEs, out: COUNT


HANDLE = Struct("<II")  # handle, zero
COUNT = Struct("<II")  # count, errno of the first that was not taken (0: all were)
DEVICE = Struct("<QIIIIIIIIQ")  # secret, block size, most: PD, MR, CQ, QP, WR in a queue, SGE in a WR, CQE; bytes
REG_MR = Struct("<QIIQQQQ")  # secret, pd, access, pin id, first byte (from the pin's), length, iova
MR = Struct("<IIII")  # handle, lkey, rkey, zero
ACCESS = Struct("<IIQ")  # mr, length, offset (bytes from the region's first)
CQ = Struct("<II")  # entries, zero
POLL = Struct("<IIII")  # cq, most wanted, milliseconds to wait for the first one (INFINITE: for ever), zero
CREATE_QP = Struct("<IIIIIIII")  # pd, send cq, recv cq, WRs to send, to receive, SGEs to send, to receive, signal all
QP = Struct("<II")  # handle, QP number
# handle, which fields count (AttrMask), state, access, destination, min_rnr_timer, rnr_retry, retry_cnt, timeout, delay (us)
MODIFY_QP = Struct("<IIIIIIIIII")
QUERY_QP = Struct("<IIIIIIIIII")  # the same; the mask is 0
POST = Struct("<II")  # qp, how many
SGE = Struct("<QII")  # address, length, lkey
SEND_WR = Struct("<QIIIIQIIQQ")  # wr_id, opcode, flags, imm, SGEs; remote: address, rkey; zero; compare or add, swap
RECV_WR = Struct("<QII")  # wr_id, SGEs, zero
WC = Struct("<QIIIIIIII")  # wr_id, status, opcode, vendor error, bytes, imm, qp number, source qp, flags


class Access(IntFlag):
    LOCAL_WRITE = 1
    REMOTE_WRITE = 2
    REMOTE_READ = 4
    REMOTE_ATOMIC = 8
    ON_DEMAND = 64


class State(IntEnum):
    RESET = 0
    INIT = 1
    RTR = 2
    RTS = 3
    ERR = 6


class AttrMask(IntFlag):
    STATE = 1
    ACCESS_FLAGS = 1 << 3
    TIMEOUT = 1 << 9
    RETRY_CNT = 1 << 10
    RNR_RETRY = 1 << 11
    MIN_RNR_TIMER = 1 << 15
    DEST_QPN = 1 << 20
    DELAY = 1 << 31  # ours


class WrOp(IntEnum):
    RDMA_WRITE = 0
    RDMA_WRITE_WITH_IMM = 1
    SEND = 2
    SEND_WITH_IMM = 3
    RDMA_READ = 4
    ATOMIC_CMP_AND_SWP = 5
    ATOMIC_FETCH_AND_ADD = 6


class SendFlag(IntFlag):
    FENCE = 1
    SIGNALED = 2
    SOLICITED = 4


class WcOp(IntEnum):
    SEND = 0
    RDMA_WRITE = 1
    RDMA_READ = 2
    COMP_SWAP = 3
    FETCH_ADD = 4
    RECV = 128
    RECV_RDMA_WITH_IMM = 129


class WcFlag(IntFlag):
    WITH_IMM = 2


class Status(IntEnum):
    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_EEC_OP_ERR = 3
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    MW_BIND_ERR = 6
    BAD_RESP_ERR = 7
    LOC_ACCESS_ERR = 8
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    LOC_RDD_VIOL_ERR = 14
    REM_INV_RD_REQ_ERR = 15
    REM_ABORT_ERR = 16
    INV_EECN_ERR = 17
    INV_EEC_STATE_ERR = 18
    FATAL_ERR = 19
    RESP_TIMEOUT_ERR = 20
    GENERAL_ERR = 21
