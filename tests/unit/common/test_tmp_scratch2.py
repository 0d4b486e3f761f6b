import sys, torch, copy
sys.path.insert(0,'/work/main')
import pytest, warnings
from common.architecture import find_writers
from common.edits import *
from common.hooks import applied_by_hooks
from common.lora import save_adapter
from common.model import load_model
from peft import PeftModel
from tests.conftest import FAMILIES
sys.path.insert(0,'/tmp/ck')
IDS = torch.tensor([[0, 40, 41, 99, 120, 7, 200, 33, 64, 65, 3, 90, 17, 18, 19, 20]])
def make_edit(model, keep="none"):
    g=torch.Generator().manual_seed(3)
    Q=torch.linalg.qr(torch.randn(32,2,dtype=torch.float64,generator=g))[0].T.contiguous()
    vectors={"direction":Q[0],"other":Q[1]}
    removals,left={}, {}
    for i,w in enumerate(find_writers(model)):
        if w.tied: left[w.name]="tied"; continue
        removals[w.name]=Removal(("direction","other"),(1.0,0.6),keep) if i%2 else Removal(("direction",),(1.0,),keep)
    return Edit(vectors,removals,{},left,{})
@pytest.mark.parametrize("family",list(FAMILIES))
def test_x(family,build_model,tmp_path,read_stream):
    model=build_model(family)
    model.save_pretrained(tmp_path/"src",max_shard_size="20KB")
    edit=make_edit(model)
    save_adapter(tmp_path/"src",edit,tmp_path/"ad")
    before=read_stream(model,IDS)[-1]
    with applied_by_hooks(model,edit): hooked=read_stream(model,IDS)[-1]
    w=copy.deepcopy(model); apply_to_weights(w,edit); weighted=read_stream(w,IDS)[-1]
    pm=PeftModel.from_pretrained(copy.deepcopy(model),str(tmp_path/"ad")).eval()
    got=read_stream(pm.get_base_model(),IDS)[-1]
    r=lambda a,b: ((a-b).norm()/b.norm()).item()
    m=pm.merge_and_unload(); merged=read_stream(m,IDS)[-1]
    print(family,"hook",r(got,hooked),"weights",r(got,weighted),"merged",r(merged,hooked),"effect",r(before,hooked))
    assert r(got,weighted)<1e-10 and r(merged,weighted)<1e-10
