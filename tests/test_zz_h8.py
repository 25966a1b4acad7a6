"""qlora & shared data"""
import pytest, json, shutil
from pathlib import Path
DATA = Path(__file__).parents[2] / "shared" / "data"
def test_qlora(script,tiny,chats,tmp_path,capsys):
    script("sft","--model_name_or_path",tiny,"--train_files",chats,"--method","qlora","--output_dir",tmp_path/"o","--max_steps",2,"--max_length",128)
    script("merge","--adapter",tmp_path/"o","--output_dir",tmp_path/"m")
    print(capsys.readouterr().out)
def test_opt(script,tmp_path):
    a=Path("/work/shared/data/adapters")
    for x in a.iterdir():
        try: script("merge","--adapter",x,"--output_dir",tmp_path/"m")
        except BaseException as e: print(type(e),e)
        try: script("merge","--adapter",x,"--base","/work/shared/data/weights/stories260K_hf","--output_dir",tmp_path/"m")
        except BaseException as e: print(type(e),e)
def test_pre(script,tiny,tmp_path):
    t=tmp_path/"t.jsonl"; t.write_text('{"text":"hello world, this is a text"}\n'*50)
    script("pretrain","--config_name",tiny,"--tokenizer_name",tiny,"--train_files",t,"--output_dir",tmp_path/"o","--max_steps",2,"--max_length",128)
