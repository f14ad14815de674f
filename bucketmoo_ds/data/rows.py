"""STUB"""
from __future__ import annotations
import dataclasses
import torch
from torch import Tensor

@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    languages: Tensor
    documents: Tensor
    target_tokens: Tensor
    is_target: Tensor
    per_sequence: bool = True
    def check(self): pass
    def of_shape(self, each, leading):
        b, s = each.shape
        if tuple(leading) == (b, s): return each
        if tuple(leading) == (b * s,): return each.flatten()
        if self.per_sequence and leading and leading[0] == b:
            return each[:, 0].view(b, *(1,) * (len(leading) - 1)).expand(leading)
        return None

def rows_of(value, args, kwargs, table, *, shifted, target_tokens=None):
    ids = kwargs.get("input_ids", args[0] if args else None)
    b, s = ids.shape[:2]
    if torch.is_tensor(value) and value.dim() == 2:
        languages, per = value, False
        documents = torch.cat([torch.zeros(b,1,dtype=torch.long), (value[:,1:]!=value[:,:-1]).long()],1).flatten().cumsum(0).view(b,s)
        documents = documents + torch.arange(b)[:,None]
    else:
        v = [table.index(x) for x in (value.tolist() if hasattr(value,"tolist") else value)]
        languages, per = torch.tensor(v)[:,None].expand(b,s), True
        documents = torch.arange(b)[:,None].expand(b,s)
    labels = kwargs.get("labels")
    is_target = torch.ones(b,s,dtype=torch.bool) if labels is None else torch.nn.functional.pad(labels[:,1:],(0,1),value=-100)!=-100
    K=len(table)
    tt = torch.zeros(K,dtype=torch.int64).scatter_add_(0, languages.clamp(min=0).flatten(), is_target.flatten().long())
    return Rows(languages, documents, tt, is_target, per)
