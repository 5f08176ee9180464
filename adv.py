import os, sys, time, warnings, logging

sys.path.insert(0, os.environ.get("NLM_ROOT", "/tmp/zoo/lead"))
import torch, torch.nn.functional as F
from torch import nn

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)
from nlm.symmetry.discover import discover
from nlm.symmetry.proof import SymmetryError, VacuousError


class M(nn.Module):
    def __init__(s, mid, shape, shapes=(), n=24):
        super().__init__()
        torch.manual_seed(0)
        s.e = nn.Linear(6, n)
        s.n = n
        s.mid = mid
        s.shape = shape
        s.w = nn.ParameterList(torch.randn(z) for z in shapes)
        with torch.no_grad():
            s.l = nn.Linear(s.f(torch.randn(3, 6)).shape[-1], 5)

    def f(s, x):
        h = torch.tanh(s.e(x))
        h = h.view(len(x), *s.shape) if s.shape else h
        y = s.mid(s, h)
        return y.flatten(1) if y.dim() > 2 or s.shape else y

    def forward(s, x):
        return s.l(s.f(x))


C = {}
ALONG = dict(
    cumsum=lambda h, d: h.cumsum(d),
    cumprod=lambda h, d: h.cumprod(d),
    cummax=lambda h, d: h.cummax(d).values,
    cummin=lambda h, d: h.cummin(d).values,
    logcumsumexp=lambda h, d: h.logcumsumexp(d),
    flip=lambda h, d: h + h.flip(d),
    flip_only=lambda h, d: h.flip(d),
    roll=lambda h, d: h * h.roll(1, d),
    roll_only=lambda h, d: h.roll(1, d),
    sort=lambda h, d: h.sort(d).values,
    argsort=lambda h, d: h * h.argsort(d),
    topk=lambda h, d: h.topk(2, d).values,
    softmax=lambda h, d: h.softmax(d),
    logsoftmax=lambda h, d: h.log_softmax(d),
    layernorm=lambda h, d: F.layer_norm(h.transpose(d, -1), [h.shape[d]]).transpose(d, -1),
    normalize=lambda h, d: F.normalize(h, dim=d),
    diff=lambda h, d: h.diff(dim=d),
    var=lambda h, d: h - h.var(d, keepdim=True),
    median=lambda h, d: h - h.median(d, keepdim=True).values,
    kth=lambda h, d: h - h.kthvalue(2, d, keepdim=True).values,
    std=lambda h, d: h / h.std(d, keepdim=True),
    conv=lambda h, d: (
        F.conv1d(
            h.movedim(d, -1).flatten(0, 1)[:, None],
            torch.tensor([[[1.0, 2.0, 1.0]]]).to(h),
            padding=1,
        )[:, 0]
        .unflatten(0, (len(h), -1))
        .movedim(-1, d)
    ),
    maxpool=lambda h, d: F.max_pool1d(h.movedim(d, -1), 3, 1, 1).movedim(-1, d),
    avgpool=lambda h, d: F.avg_pool1d(h.movedim(d, -1), 2, 1).movedim(-1, d),
    interp=lambda h, d: F.interpolate(h.movedim(d, -1), scale_factor=2, mode="linear").movedim(
        -1, d
    ),
    nearest=lambda h, d: F.interpolate(h.movedim(d, -1), scale_factor=2).movedim(-1, d),
    padreflect=lambda h, d: F.pad(h.movedim(d, -1), (1, 1), mode="reflect").movedim(-1, d),
    padcirc=lambda h, d: F.pad(h.movedim(d, -1), (1, 1), mode="circular").movedim(-1, d),
    padrep=lambda h, d: F.pad(h.movedim(d, -1), (1, 1), mode="replicate").movedim(-1, d),
    padconst=lambda h, d: (
        F.pad(h.movedim(d, -1), (1, 0)).movedim(-1, d)[:, : h.shape[1], : h.shape[2]] + h
    ),
    unfold=lambda h, d: h.unfold(d, 2, 1).sum(-1),
    fft=lambda h, d: torch.fft.fft(h, dim=d).real,
    rev_index=lambda h, d: h.index_select(d, torch.arange(h.shape[d] - 1, -1, -1)) + h,
    constmat=lambda h, d: (
        h.movedim(d, -1) @ torch.arange(float(h.shape[d] ** 2)).view(h.shape[d], -1).to(h).cos()
    ).movedim(-1, d),
    shift=lambda h, d: torch.cat([h.narrow(d, 1, h.shape[d] - 1), h.narrow(d, 0, 1)], d) + h,
    prev=lambda h, d: (
        torch.cat([torch.zeros_like(h.narrow(d, 0, 1)), h.narrow(d, 0, h.shape[d] - 1)], d) * h
    ),
    swap=lambda h, d: torch.stack(h.unbind(d)[::-1], d) + h,
    swap_only=lambda h, d: torch.stack(h.unbind(d)[::-1], d),
    pairs=lambda h, d: (
        h.movedim(d, -1).unflatten(-1, (2, -1)).flip(-2).flatten(-2).movedim(-1, d) * h
    ),
    cross=lambda h, d: h.select(d, 0).unsqueeze(d) * h,
    first=lambda h, d: h.select(d, 0) + h.select(d, 1),
    some=lambda h, d: h.narrow(d, 0, 2),
    lastdiff=lambda h, d: h - h.select(d, -1).unsqueeze(d),
    argmaxpick=lambda h, d: h + h.gather(d, h.argmax(d, keepdim=True)),
    anymask=lambda h, d: h.masked_fill((h > 0).any(d, keepdim=True), 0.0),
    cumany=lambda h, d: h * (h > 0).cumsum(d),
    gram=lambda h, d: torch.einsum("bij,bkj->bik", h.transpose(1, d), h.transpose(1, d)),
    gram2=lambda h, d: h.transpose(1, d) @ h.transpose(1, d).transpose(1, 2),
    cdist=lambda h, d: torch.cdist(h.transpose(1, d), h.transpose(1, d)),
    attn=lambda h, d: F.scaled_dot_product_attention(*[h.transpose(1, d)] * 3),
    attncausal=lambda h, d: F.scaled_dot_product_attention(
        *[h.transpose(1, d)] * 3, is_causal=True
    ),
    outer=lambda h, d: h.sum(d)[:, :, None] * h.sum(d)[:, None],
    repeat=lambda h, d: (
        h.repeat_interleave(2, d) + h.repeat(*[2 if i == d else 1 for i in range(3)])
    ),
    tile=lambda h, d: h.repeat(*[2 if i == d else 1 for i in range(3)]),
    glu=lambda h, d: F.glu(h, d),
    chunkadd=lambda h, d: sum(h.chunk(2, d)),
    renorm=lambda h, d: torch.renorm(h, 2, d, 0.5),
    std1=lambda h, d: torch.logsumexp(h, d),
    prod=lambda h, d: h.prod(d),
    quant=lambda h, d: h - h.quantile(0.3, d, keepdim=True),
    trilm=lambda h, d: h.transpose(1, d).tril(),
    bn=lambda h, d: F.batch_norm(
        h.transpose(1, d), torch.arange(h.shape[d]).to(h), torch.ones(h.shape[d]).to(h)
    ).transpose(1, d),
    selmul=lambda h, d: (
        h * torch.arange(h.shape[d]).to(h).view(*[-1 if i == d else 1 for i in range(3)])
    ),
    inst=lambda h, d: F.instance_norm(h.movedim(d, -1)).movedim(-1, d),
    gn=lambda h, d: F.group_norm(h.movedim(d, 1), 2).movedim(1, d),
    lppool=lambda h, d: F.adaptive_avg_pool1d(h.movedim(d, -1), 2).movedim(-1, d),
    dot=lambda h, d: F.cosine_similarity(h, h.flip(d), dim=3 - d),
    scan=lambda h, d: torch.stack([s + i for i, s in enumerate(h.unbind(d))], d),
    acc=lambda h, d: torch.stack(list(__import__("itertools").accumulate(h.unbind(d))), d),
)
for k, f in ALONG.items():
    for d in (1, 2):
        C[f"{k}@{d}"] = (lambda m, h, f=f, d=d: f(h, d), (4, 6))


# experts
def experts(fn):
    return (fn, None, ((24, 4), (4, 24, 7), (4, 7, 9), (7, 9)))


def route(m, h, k=2):
    v, i = (h @ m.w[0]).softmax(-1).topk(k, -1)
    return v, i


def hid(m, h):
    v, i = route(m, h)
    return v, i, torch.einsum("bd,bkdf->bkf", h, m.w[1][i]).tanh()


E = dict(
    plain=lambda m, h: (
        lambda v, i, x: (torch.einsum("bkf,bkfo->bko", x, m.w[2][i]) * v[..., None]).sum(1)
    )(*hid(m, h)),
    sumk=lambda m, h: (lambda v, i, x: x.sum(1) @ m.w[3])(*hid(m, h)),
    sumk_e=lambda m, h: (lambda v, i, x: torch.einsum("bf,bkfo->bo", x.sum(1), m.w[2][i]))(
        *hid(m, h)
    ),
    softk=lambda m, h: (lambda v, i, x: torch.einsum("bkf,bkfo->bo", x.softmax(1), m.w[2][i]))(
        *hid(m, h)
    ),
    cumk=lambda m, h: (lambda v, i, x: torch.einsum("bkf,bkfo->bo", x.cumsum(1), m.w[2][i]))(
        *hid(m, h)
    ),
    shared_down=lambda m, h: (lambda v, i, x: x @ m.w[3])(*hid(m, h)).flatten(1),
    sortk=lambda m, h: (lambda v, i, x: torch.einsum("bkf,bkfo->bo", x.sort(1).values, m.w[2][i]))(
        *hid(m, h)
    ),
    flipk=lambda m, h: (lambda v, i, x: torch.einsum("bkf,bkfo->bo", x.flip(1), m.w[2][i]))(
        *hid(m, h)
    ),
    fliplook=lambda m, h: (lambda v, i, x: torch.einsum("bkf,bkfo->bo", x, m.w[2][i.flip(1)]))(
        *hid(m, h)
    ),
    batchmean=lambda m, h: (
        lambda v, i, x: torch.einsum("bkf,bkfo->bo", x - x.mean(0, keepdim=True), m.w[2][i])
    )(*hid(m, h)),
    gramb=lambda m, h: (lambda v, i, x: h + torch.einsum("bkf,ckf->bc", x, x).sum(1, keepdim=True))(
        *hid(m, h)
    ),
    rollb=lambda m, h: (lambda v, i, x: torch.einsum("bkf,bkfo->bo", x.roll(1, 0), m.w[2][i]))(
        *hid(m, h)
    ),
    add2=lambda m, h: (
        lambda v, i: torch.einsum(
            "bf,bfo->bo",
            torch.einsum("bd,bdf->bf", h, m.w[1][i[:, 0]] + m.w[1][i[:, 1]]).tanh(),
            m.w[2][i[:, 0]],
        )
    )(*route(m, h)),
    cross2=lambda m, h: (
        lambda v, i: torch.einsum(
            "bf,bfo->bo", torch.einsum("bd,bdf->bf", h, m.w[1][i[:, 0]]).tanh(), m.w[2][i[:, 1]]
        )
    )(*route(m, h)),
    same2=lambda m, h: (
        lambda v, i: torch.einsum(
            "bf,bfo->bo", torch.einsum("bd,bdf->bf", h, m.w[1][i[:, 0]]).tanh(), m.w[2][i[:, 0]]
        )
    )(*route(m, h)),
    mod=lambda m, h: (
        lambda v, i: torch.einsum(
            "bf,bfo->bo",
            torch.einsum("bd,bdf->bf", h, m.w[1][(i[:, 0] + 1) % 4]).tanh(),
            m.w[2][i[:, 0]],
        )
    )(*route(m, h)),
    sorted_idx=lambda m, h: (
        lambda v, i: torch.einsum(
            "bkf,bkfo->bko",
            torch.einsum("bd,bkdf->bkf", h, m.w[1][i.sort(-1).values]).tanh(),
            m.w[2][i.sort(-1).values],
        )
    )(*route(m, h)).flatten(1),
    onehot=lambda m, h: torch.einsum(
        "bef,efo,be->bo",
        torch.einsum("bd,edf->bef", h, m.w[1]).tanh(),
        m.w[2],
        F.one_hot((h @ m.w[0]).argmax(-1), 4).to(h),
    ),
    gate_all=lambda m, h: torch.einsum(
        "bef,efo,be->bo",
        torch.einsum("bd,edf->bef", h, m.w[1]).tanh(),
        m.w[2],
        (h @ m.w[0]).softmax(-1),
    ),
    mix_e=lambda m, h: (
        torch.einsum(
            "bef,be->bf", torch.einsum("bd,edf->bef", h, m.w[1]).tanh(), (h @ m.w[0]).softmax(-1)
        )
        @ m.w[3]
    ),
    merge_w=lambda m, h: (
        torch.einsum(
            "bd,bdf->bf", h, torch.einsum("be,edf->bdf", (h @ m.w[0]).softmax(-1), m.w[1])
        ).tanh()
        @ m.w[3]
    ),
    soft_merge2=lambda m, h: torch.einsum(
        "bf,bfo->bo",
        torch.einsum(
            "bd,bdf->bf", h, torch.einsum("be,edf->bdf", (h @ m.w[0]).softmax(-1), m.w[1])
        ).tanh(),
        torch.einsum("be,efo->bfo", (h @ m.w[0]).softmax(-1), m.w[2]),
    ),
    loop=lambda m, h: sum(
        (h @ m.w[0]).softmax(-1)[:, e : e + 1] * ((h @ m.w[1][e]).tanh() @ m.w[2][e])
        for e in range(4)
    ),
    loop_shift=lambda m, h: sum(
        (h @ m.w[0]).softmax(-1)[:, e : e + 1] * ((h @ m.w[1][e]).tanh() @ m.w[2][(e + 1) % 4])
        for e in range(4)
    ),
    loop_mask=lambda m, h: sum(
        ((h @ m.w[0]).argmax(-1) == e)[:, None] * ((h @ m.w[1][e]).tanh() @ m.w[2][e])
        for e in range(4)
    ),
    loop_acc=lambda m, h: sum((h @ m.w[1][e]).tanh() for e in range(4)) @ m.w[3],
    loop_number=lambda m, h: sum(e * ((h @ m.w[1][e]).tanh() @ m.w[2][e]) for e in range(4)),
    capacity=lambda m, h: (
        lambda mask: torch.einsum(
            "bef,efo,be->bo",
            torch.einsum("bd,edf->bef", h, m.w[1]).tanh(),
            m.w[2],
            mask * (mask.cumsum(0) < 3),
        )
    )(F.one_hot((h @ m.w[0]).argmax(-1), 4).to(h)),
    ecumsum=lambda m, h: torch.einsum(
        "bef,efo,be->bo",
        torch.einsum("bd,edf->bef", h, m.w[1]).tanh(),
        m.w[2],
        (h @ m.w[0]).softmax(-1).cumsum(-1),
    ),
)
for k, f in E.items():
    C["experts_" + k] = experts(f)
# sums
S = dict(
    cat_swap=lambda m, h: (
        torch.cat([h @ m.w[0], h @ m.w[1]], -1) + torch.cat([h @ m.w[1], h @ m.w[0]], -1)
    ),
    cat_view=lambda m, h: torch.cat([h @ m.w[0], h @ m.w[1]], -1).view(-1, 2, 8).sum(1),
    cat_view2=lambda m, h: torch.cat([h @ m.w[0], h @ m.w[1]], -1).view(-1, 8, 2).sum(2),
    cat_inter=lambda m, h: (
        torch.stack([h @ m.w[0], h @ m.w[1]], -1).flatten(1)
        * torch.cat([h @ m.w[0], h @ m.w[1]], -1)
    ),
    cat_shift=lambda m, h: torch.cat([h @ m.w[0], h @ m.w[1]], -1)[:, 3:13],
    cat_gram=lambda m, h: (lambda z: (z @ z.transpose(1, 2)).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1], h @ m.w[2]], 1)
    ),
    stack_attn=lambda m, h: (lambda z: F.scaled_dot_product_attention(z, z, z).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1], h @ m.w[2]], 1)
    ),
    stack_sum=lambda m, h: torch.stack([h @ m.w[0], h @ m.w[1]], 1).sum(1),
    stack_soft=lambda m, h: torch.stack([h @ m.w[0], h @ m.w[1]], 1).softmax(1).flatten(1),
    stack_lin=lambda m, h: (torch.stack([h @ m.w[0], h @ m.w[1], h @ m.w[2]], 1) @ m.w[3]).flatten(
        1
    ),
    stack_sel=lambda m, h: torch.stack([h @ m.w[0], h @ m.w[1]], 1)[:, 1],
    stack_norm=lambda m, h: F.layer_norm(torch.stack([h @ m.w[0], h @ m.w[1]], 1), [8]).flatten(1),
    stack_norm2=lambda m, h: F.layer_norm(torch.stack([h @ m.w[0], h @ m.w[1]], 1), [2, 8]).flatten(
        1
    ),
    stack_conv=lambda m, h: F.conv1d(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1), torch.ones(3, 2, 1).to(h)
    ).flatten(1),
    stack_mul=lambda m, h: (lambda z: (z * z.flip(1)).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1)
    ),
    stack_kron=lambda m, h: (lambda z: torch.einsum("bif,bjf->bij", z, z).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1)
    ),
    stack_3=lambda m, h: (lambda z: torch.einsum("bif,bjf,bkf->bijk", z, z, z).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1)
    ),
    stack_bcast=lambda m, h: (lambda z: (z[:, :, None] * z[:, None]).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1)
    ),
    stack_bcast_sum=lambda m, h: (lambda z: (z[:, :, None] * z[:, None]).sum(-1).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1)
    ),
    stack_minus=lambda m, h: (lambda z: (z[:, :, None] - z[:, None]).abs().sum(-1).flatten(1))(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1)
    ),
    tok=lambda m, h: (lambda z: (z + F.scaled_dot_product_attention(z, z, z))[:, 0])(
        torch.cat([m.w[4].expand(len(h), -1, -1), torch.stack([h @ m.w[0], h @ m.w[1]], 1)], 1)
    ),
    tok_first=lambda m, h: torch.cat(
        [m.w[4].expand(len(h), -1, -1), torch.stack([h @ m.w[0], h @ m.w[1]], 1)], 1
    )[:, 0],
    tok_lin=lambda m, h: (
        torch.cat([m.w[4].expand(len(h), -1, -1), torch.stack([h @ m.w[0], h @ m.w[1]], 1)], 1)
        @ m.w[3]
    ).sum(1),
    tok_mean=lambda m, h: torch.cat(
        [m.w[4].expand(len(h), -1, -1), torch.stack([h @ m.w[0], h @ m.w[1]], 1)], 1
    ).mean(1),
    tok_flat=lambda m, h: torch.cat(
        [m.w[4].expand(len(h), -1, -1), torch.stack([h @ m.w[0], h @ m.w[1]], 1)], 1
    ).flatten(1),
    tok_max=lambda m, h: torch.cat(
        [m.w[4].expand(len(h), -1, -1), torch.stack([h @ m.w[0], h @ m.w[1]], 1)], 1
    ).amax(1),
    tok_pe=lambda m, h: (
        (
            torch.cat([m.w[4].expand(len(h), -1, -1), torch.stack([h @ m.w[0], h @ m.w[1]], 1)], 1)
            + m.w[5]
        )
        .tanh()
        .flatten(1)
    ),
    pe_rows=lambda m, h: ((h @ m.w[0])[:, None] + m.w[5]).tanh().flatten(1),
    pe_sum=lambda m, h: ((h @ m.w[0])[:, None] + m.w[5]).tanh().sum(1),
    pick=lambda m, h: (lambda z: z[torch.arange(len(h)), (h @ m.w[0]).argmax(-1) % 2])(
        torch.stack([h @ m.w[0], h @ m.w[1]], 1)
    ),
    pick2=lambda m, h: (
        lambda z: z.gather(1, (h @ m.w[6]).argmax(-1)[:, None, None].expand(-1, 1, 8))[:, 0]
    )(torch.stack([h @ m.w[0], h @ m.w[1]], 1)),
    pick3=lambda m, h: (
        lambda z: (
            z.gather(1, (h @ m.w[6]).argmax(-1)[:, None, None].expand(-1, 1, 8)).flatten(1)
            + z[:, 0]
        )
    )(torch.stack([h @ m.w[0], h @ m.w[1]], 1)),
    pickw=lambda m, h: h @ m.w[6][:, (h @ m.w[6]).argmax(-1)] if 0 else h * m.w[6][:, 0],
    where=lambda m, h: torch.where((h.sum(-1, keepdim=True) > 0), h @ m.w[0], h @ m.w[1]),
    lerp=lambda m, h: torch.lerp(h @ m.w[0], h @ m.w[1], 0.3),
    addcmul=lambda m, h: torch.addcmul(h @ m.w[0], h @ m.w[1], h @ m.w[2]),
    kron=lambda m, h: torch.kron(h @ m.w[0], torch.tensor([[1.0, 2.0]]).to(h)),
    outer=lambda m, h: ((h @ m.w[0])[:, :, None] * (h @ m.w[1])[:, None]).flatten(1),
    outer_t=lambda m, h: (lambda o: (o + o.transpose(1, 2)).flatten(1))(
        (h @ m.w[0])[:, :, None] * (h @ m.w[1])[:, None]
    ),
    diag=lambda m, h: ((h @ m.w[0])[:, :, None] * (h @ m.w[1])[:, None]).diagonal(dim1=1, dim2=2),
    inv=lambda m, h: torch.linalg.solve(
        m.w[3] @ m.w[3].T + torch.eye(8).to(h), (h @ m.w[0])[..., None]
    )[..., 0],
    det=lambda m, h: h * torch.linalg.slogdet(m.w[3])[1],
    svd=lambda m, h: h * torch.linalg.svdvals(m.w[3]).sum(),
    mexp=lambda m, h: h @ m.w[0] @ torch.linalg.matrix_exp(m.w[3]),
    mpow=lambda m, h: h @ m.w[0] @ torch.linalg.matrix_power(m.w[3], 3),
    qr=lambda m, h: h @ m.w[0] @ torch.linalg.qr(m.w[3])[0],
    tri=lambda m, h: h @ m.w[0] @ (m.w[3].triu(1) - m.w[3].triu(1).T),
    skew=lambda m, h: h @ m.w[0] @ (m.w[3] - m.w[3].T),
    softmaxw=lambda m, h: h @ m.w[0] @ m.w[3].softmax(0),
    softmaxw1=lambda m, h: h @ m.w[0] @ m.w[3].softmax(1),
    eyeplus=lambda m, h: h @ m.w[0] @ (torch.eye(8).to(h) + m.w[3]),
    masku=lambda m, h: h @ m.w[0] @ (m.w[3] * torch.ones(8, 8).triu().to(h)),
    cumw=lambda m, h: h @ m.w[0] @ m.w[3].cumsum(0),
    sortw=lambda m, h: h @ m.w[0] @ m.w[3].sort(0).values,
    normw=lambda m, h: h @ m.w[0] @ F.normalize(m.w[3], dim=0),
    stdw=lambda m, h: (
        h @ m.w[0] @ ((m.w[3] - m.w[3].mean(1, keepdim=True)) / m.w[3].std(1, keepdim=True))
    ),
    flatw=lambda m, h: h @ m.w[0] @ m.w[3].flatten().softmax(0).view(8, 8),
    rollw=lambda m, h: h @ m.w[0] @ m.w[3].roll(1, 0),
    transw=lambda m, h: h @ m.w[0] @ m.w[3].view(4, 2, 8).transpose(0, 1).reshape(8, 8),
    splitw=lambda m, h: h @ m.w[0] @ torch.cat(m.w[3].split([3, 5]), 0),
    splitw2=lambda m, h: h @ m.w[0] @ torch.cat(m.w[3].split([3, 5])[::-1], 0),
    twoviews=lambda m, h: (
        lambda z: z.view(-1, 2, 4).softmax(1).flatten(1) + z.view(-1, 4, 2).softmax(1).flatten(1)
    )(h @ m.w[0]),
    twoviews2=lambda m, h: (
        lambda z: torch.cat([z.view(-1, 2, 4).amax(2), z.view(-1, 4, 2).amax(2)], 1)
    )(h @ m.w[0]),
    threeviews=lambda m, h: (
        lambda z: torch.cat([z.view(-1, 2, 4).amax(1), z.view(-1, 4, 2).amax(1)], 1)
    )(h @ m.w[0]),
    tview=lambda m, h: (lambda z: z.t().reshape(-1)[: len(h) * 8].view(8, -1).t())(h @ m.w[0]),
)
for k, f in S.items():
    C["sum_" + k] = (f, None, ((24, 8), (24, 8), (24, 8), (8, 8), (1, 1, 8), (3, 8), (24, 2)))
names = [a for a in sys.argv[1:] if a[0] != "-"] or list(C)
bad = 0


def al(*a):
    raise TimeoutError()


import signal

signal.signal(signal.SIGALRM, al)
for n in names:
    signal.alarm(60)
    try:
        m = M(*C[n]).eval()
        x = torch.randn(3, 6)
    except Exception as e:
        print("BUILD", n, repr(e)[:150])
        continue
    try:
        s = discover(m, (x,), {})
        if "-v" in sys.argv:
            print(s.show(), s.pinned)
        for i in range(4):
            try:
                s.verify(m, (torch.randn([3, 5, 2, 1][i], 6),))
            except VacuousError as e:
                s = s.restrict([g for g in s.free if g not in e.groups])
                s.verify(m, (torch.randn([3, 5, 2, 1][i], 6),))
        print(
            "ok   ",
            n,
            len(s.free),
            s.permutation_count,
            {
                k: str([str(z) for z in v])
                for k, v in s.params.items()
                if k in ("e.weight",) or k[:2] == "w." and any("g" in str(z) for z in v)
            },
            dict(s.opaque_ops) or "",
            flush=True,
        )
    except SymmetryError as e:
        print("WRONG", n, str(e)[:300], flush=True)
        bad += 1
    except BaseException as e:
        print("EXC  ", n, type(e).__name__, str(e)[:300].replace("\n", " "), flush=True)
    signal.alarm(0)
print("wrong", bad)
