import sys, torch, shutil, copy, traceback
sys.path.insert(0,'/work/main')
import os
os.environ.update(HF_HUB_OFFLINE="1")
from pathlib import Path
import pytest
from common.architecture import find_writers
from common.edits import *
from common.checkpoint import apply_to_checkpoint
from common.model import load_model
from safetensors.torch import load_file

def make_edit(model, keep="none"):
    g=torch.Generator().manual_seed(3)
    Q=torch.linalg.qr(torch.randn(32,2,dtype=torch.float64,generator=g))[0].T.contiguous()
    vectors={"direction":Q[0],"other":Q[1]}
    removals,left={}, {}
    for i,w in enumerate(find_writers(model)):
        if w.tied: left[w.name]="tied"; continue
        removals[w.name]=Removal(("direction","other"),(1.0,0.6),keep) if i%2 else Removal(("direction",),(1.0,),keep)
    return Edit(vectors,removals,{},left,{})

from tests.conftest import FAMILIES
@pytest.mark.parametrize("dtype",[torch.float32,torch.bfloat16])
@pytest.mark.parametrize("family",list(FAMILIES))
def test_x(family,build_model,tmp_path,dtype):
    model=build_model(family,dtype=dtype)
    model.save_pretrained(tmp_path/"src",max_shard_size="20KB")
    for keep in ("none","column","row"):
        src=load_model(tmp_path/"src",dtype=str(dtype).split(".")[1])
        edit=make_edit(src,keep)
        out=tmp_path/keep
        w=apply_to_checkpoint(tmp_path/"src",edit,out)
        got=load_model(out,dtype=str(dtype).split(".")[1])
        apply_to_weights(src,edit)
        a,b=dict(src.named_parameters()),dict(got.named_parameters())
        assert a.keys()==b.keys()
        bad=[(n,(a[n].double()-b[n].double()).abs().max().item()) for n in a if not torch.equal(a[n],b[n])]
        print(family,dtype,keep,len(bad),bad[:3],max(x.after/x.before for x in w.values()), list((tmp_path).iterdir()))
        assert all(d<(1e-6 if dtype==torch.float32 else 3e-2) for _,d in bad)
