//! Files that are written here, read by the formats' own Python packages, and the other way round.
//!
//! `PLANISH_PYTHON` names a Python with `safetensors`, `gguf` and `numpy`; else `python3` is asked.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

use formats::{
    Dtype,
    gguf::{self, GgmlType, Texts, Writer},
    safetensors::{self, Archive, Entry},
};
use std::{path::Path, process::Command};
use tensor::Bytes;

/// Runs a script with the directory as its argument; `None` (and a line that says so) without the packages.
fn python(packages: &str, script: &str, directory: &Path) -> Option<String> {
    let python = std::env::var("PLANISH_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", &format!("import {packages}")]).output();
    if !has.is_ok_and(|o| o.status.success()) {
        told(&format!("skipped: needs a Python with {packages} (PLANISH_PYTHON)"));
        return None;
    }
    let out = Command::new(&python).args(["-c", script]).arg(directory).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(String::from_utf8(out.stdout).unwrap())
}

fn floats(n: usize) -> Bytes {
    Bytes::from_f32((0..n).map(|i| i as f32 * 0.5).collect())
}

#[test]
fn safetensors_reads_ours() {
    let dir = tempfile::tempdir().unwrap();
    let entry =
        |name: &str, dtype, shape: &[usize], bytes| Entry { name: name.into(), dtype, shape: shape.into(), bytes };
    let bits: Vec<u8> = [1.0f32, -2.5, 3.25].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let entries = [
        entry("odd", Dtype::U8, &[3], Bytes::from_vec(vec![1, 2, 3])),
        entry("half", Dtype::F16, &[3, 1], Bytes::from_vec(bits)),
        entry("w", Dtype::F32, &[2, 3], floats(6)),
        entry("none", Dtype::F32, &[0, 3], floats(0)),
    ];
    safetensors::write(&dir.path().join("model.safetensors"), &entries, &[("format", "pt".into())]).unwrap();
    let script = "
import sys, json
from safetensors import safe_open
with safe_open(sys.argv[1] + '/model.safetensors', 'numpy') as f:
    print(json.dumps([f.metadata(), {k: [list(f.get_tensor(k).shape), str(f.get_tensor(k).dtype), f.get_tensor(k).tolist()] for k in sorted(f.keys())}]))
";
    let Some(said) = python("safetensors, numpy", script, dir.path()) else { return };
    assert_eq!(
        said.trim(),
        "[{\"format\": \"pt\"}, {\"half\": [[3, 1], \"float16\", [[1.0], [-2.5], [3.25]]], \
         \"none\": [[0, 3], \"float32\", []], \"odd\": [[3], \"uint8\", [1, 2, 3]], \
         \"w\": [[2, 3], \"float32\", [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]]}]"
    );
}

#[test]
fn we_read_what_safetensors_writes() {
    let dir = tempfile::tempdir().unwrap();
    let script = "
import sys, numpy
from safetensors.numpy import save_file
save_file({'w': numpy.arange(6, dtype='float32').reshape(2, 3), 'i': numpy.array([-1, 2], 'int64'), 'b': numpy.array(True)},
          sys.argv[1] + '/model.safetensors', {'format': 'np'})
";
    if python("safetensors, numpy", script, dir.path()).is_none() {
        return;
    }
    let archive = Archive::open(dir.path()).unwrap();
    let w = archive.get("w").unwrap();
    assert_eq!((w.dtype, &w.shape[..]), (Dtype::F32, &[2, 3][..]));
    assert_eq!(w.bytes.as_f32().unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(archive.get("i").unwrap().bytes[..8], [0xff; 8]);
    assert_eq!(archive.get("b").unwrap().shape, [0; 0]);
    assert_eq!(archive.metadata("format"), Some("np"));
}

#[test]
fn gguf_reads_ours() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = Writer::new();
    w.set("general.architecture", "x");
    w.set("x.u8", 200u8);
    w.set("x.i64", -5i64);
    w.set("x.f32", 0.5f32);
    w.set("x.flag", true);
    w.set("x.texts", Texts::from_iter(["a", "", "\u{e9}"]));
    w.set("x.numbers", vec![1i32, -2]);
    w.tensor("a", vec![2, 3], GgmlType::F32, Box::new(|| Ok(floats(6))));
    w.tensor("q", vec![2, 32], GgmlType(8), Box::new(|| Ok(Bytes::from_vec((0..68).collect()))));
    w.write(&dir.path().join("m.gguf")).unwrap();
    let script = "
import sys, json
from gguf import GGUFReader
r = GGUFReader(sys.argv[1] + '/m.gguf')
print(json.dumps({k: f.contents() for k, f in r.fields.items() if k.startswith(('x.', 'general.'))}))
print(json.dumps([[t.name, t.shape.tolist(), t.tensor_type.name, t.data.flatten()[:4].tolist(), t.data_offset % 32] for t in r.tensors]))
";
    let Some(said) = python("gguf, numpy", script, dir.path()) else { return };
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(
        lines[0],
        "{\"general.architecture\": \"x\", \"x.u8\": 200, \"x.i64\": -5, \"x.f32\": 0.5, \"x.flag\": true, \
         \"x.texts\": [\"a\", \"\", \"\\u00e9\"], \"x.numbers\": [1, -2]}"
    );
    assert_eq!(
        lines[1],
        "[[\"a\", [3, 2], \"F32\", [0.0, 0.5, 1.0, 1.5], 0], [\"q\", [32, 2], \"Q8_0\", [0, 1, 2, 3], 0]]"
    );
}

#[test]
fn we_read_what_gguf_writes() {
    let dir = tempfile::tempdir().unwrap();
    let script = "
import sys, numpy
from gguf import GGUFWriter
w = GGUFWriter(sys.argv[1] + '/m.gguf', 'x')
w.add_uint64('x.far', 1 << 40)
w.add_float64('x.f64', 0.25)
w.add_bool('x.flag', False)
w.add_array('x.texts', ['a', '\u{e9}'])
w.add_array('x.floats', [1.5, -2.5])
w.add_tensor('odd', numpy.arange(3, dtype='float32'))
w.add_tensor('w', numpy.arange(6, dtype='float16').reshape(2, 3))
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
";
    if python("gguf, numpy", script, dir.path()).is_none() {
        return;
    }
    let f = gguf::File::open(&dir.path().join("m.gguf")).unwrap();
    assert_eq!(f.text("general.architecture").unwrap(), Some("x"));
    assert_eq!(f.count("x.far").unwrap(), Some(1 << 40));
    assert_eq!(f.number("x.f64").unwrap(), Some(0.25));
    assert_eq!(f.flag("x.flag").unwrap(), Some(false));
    assert_eq!(f.texts("x.texts").unwrap().unwrap(), ["a", "\u{e9}"]);
    assert_eq!(f.numbers("x.floats").unwrap().unwrap(), [1.5, -2.5]);
    assert_eq!(f.tensor("odd").unwrap().bytes.as_f32().unwrap(), [0.0, 1.0, 2.0]);
    let w = f.tensor("w").unwrap();
    assert_eq!((w.kind.name(), &w.shape[..], w.bytes.len()), ("F16", &[2, 3][..], 12));
}

/// Says so past the test harness, which keeps what a passing test prints to itself.
fn told(words: &str) {
    use std::io::Write;
    // A closed standard error is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{words}");
}
