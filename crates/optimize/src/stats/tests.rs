//! What is gathered, written and read is what was gathered; damaged and foreign files are told.

use super::*;
use crate::{methods, progress::Silent, recipe::Recipe};
use model::load;

fn sample(dir: &Path) -> Gpt {
    for (name, bytes) in sample::files() {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    Gpt::open(dir).unwrap()
}

fn texts() -> Vec<Vec<u32>> {
    (0..6u32).map(|n| (0..90).map(|i| (i * i * (n + 3) + n) % 200).collect()).collect()
}

fn built(gpt: &Gpt, method: &str) -> Vec<Built> {
    Recipe::one(method, Storage::parse("int4g32").unwrap(), 0).build(&gpt.model).unwrap()
}

fn says(result: Result<impl Sized>, words: &[&str]) {
    let e = result.err().unwrap().to_string();
    assert!(words.iter().all(|w| e.contains(w)), "{words:?}: {e}");
}

#[test]
fn what_is_read_is_what_was_gathered_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let gpt = sample(dir.path());
    for name in ["s.safetensors", "s.gguf"] {
        let path = dir.path().join(name);
        let done = gather(&gpt, &texts(), "the text of a.txt", &path, &Silent).unwrap();
        assert_eq!((done.tokens, done.sequences), (540, 6));
        let direct = walk::statistics(&gpt.model, Kind::of(&path).unwrap().needs(), &texts(), &Silent).unwrap();
        let known = Known::open(&gpt, &path).unwrap();
        let all = known.all().unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), direct.keys().collect::<Vec<_>>());
        for (site, stats) in &all {
            let want = &direct[site];
            assert_eq!(stats.peak, want.peak, "{site}");
            assert_eq!(stats.gram.as_ref().map(Gram::mean), want.gram.as_ref().map(Gram::mean), "{site}");
            let cols = known.widths[site];
            assert_eq!(stats.mean_squares(cols).unwrap(), want.mean_squares(cols).unwrap(), "{site}");
        }
        for (site, linear) in gpt.model.linears.iter().filter(|(s, _)| s.role != Role::Embed) {
            assert_eq!(
                known.of(*site).unwrap().mean_squares(linear.weight.cols()).unwrap().len(),
                linear.weight.cols()
            );
        }
        assert!(known.notes(&gpt, &built(&gpt, "imatrix")).unwrap().is_empty());
    }
    let imatrix = Imatrix::read(&dir.path().join("s.gguf")).unwrap();
    assert_eq!((imatrix.datasets.as_slice(), imatrix.chunks, imatrix.chunk_size), (&["a.txt".to_string()][..], 6, 90));
    assert!(imatrix.entries.values().all(|e| e.counts == [540.0]));
}

#[test]
fn matrices_that_share_a_tensor_share_statistics() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i.gguf");
    for (family, fused) in [("phi3", "attn_qkv"), ("neox", "attn_qkv"), ("llama-mha", "attn_k"), ("gpt2", "attn_qkv")] {
        let model = load::open(&root.join(family)).unwrap().model;
        let texts: Vec<Vec<u32>> = vec![(0..16u32).collect(), (5..25u32).collect()];
        let stats = walk::statistics(&model, Kind::Imatrix.needs(), &texts, &Silent).unwrap();
        let names = save::gguf_matrices(&model).unwrap();
        write_imatrix(&names, &stats, &texts, "text", &path).unwrap();
        let read = Imatrix::read(&path).unwrap();
        assert!(read.entries.keys().any(|k| k.contains(fused)), "{family}: {:?}", read.entries.keys());
        let held = Held::Imatrix(BTreeMap::new());
        let mut known = Known { path: path.clone(), held, widths: BTreeMap::new(), model: None };
        known.read_imatrix(&model).unwrap();
        for site in model.spec.matrices().into_iter().filter(|s| s.layer.is_some()) {
            let (got, want) =
                (known.of(site).unwrap().squares.unwrap(), stats[&reader(site)].squares.as_ref().unwrap());
            assert_eq!(got.mean(), want.mean(), "{family}: {site}");
        }
    }
}

#[test]
fn methods_are_told_what_a_file_cannot_hold() {
    let dir = tempfile::tempdir().unwrap();
    let gpt = sample(dir.path());
    let (imatrix, moments) = (Path::new("i.gguf"), Path::new("m.safetensors"));
    for (path, method, words) in [
        (imatrix, "gptaq", &["i.gguf", "--method imatrix", "--method gptq"][..]),
        (moments, "gptaq", &["no file can hold", "--method gptq"]),
        (imatrix, "gptq", &["diagonal alone", "--method imatrix", ".safetensors"]),
        (imatrix, "awq", &["method awq", "--method imatrix"]),
        (imatrix, "smoothquant", &["largest inputs", ".safetensors"]),
        (moments, "rtn", &["looks at no statistics"]),
        (Path::new("m.bin"), "gptq", &["m.bin", ".gguf", ".safetensors"]),
    ] {
        says(check(path, &built(&gpt, method)), words);
    }
    for (path, method) in
        [(imatrix, "imatrix"), (moments, "imatrix"), (moments, "gptq"), (moments, "awq"), (moments, "smoothquant")]
    {
        check(path, &built(&gpt, method)).unwrap();
    }
    let twice: Vec<Built> = ["rtn", "gptq"].into_iter().flat_map(|m| built(&gpt, m)).collect();
    says(check(moments, &twice), &["step 2"]);
    assert!(methods::find("imatrix").is_ok());
}

#[test]
fn damaged_and_foreign_statistics_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let gpt = sample(dir.path());
    let path = dir.path().join("s.safetensors");
    gather(&gpt, &texts(), "text", &path, &Silent).unwrap();
    let archive = Archive::open(&path).unwrap();
    let entries: Vec<Entry> = archive
        .tensors()
        .iter()
        .map(|(name, t)| Entry {
            name: name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            bytes: Bytes::from_vec(t.bytes.to_vec()),
        })
        .collect();
    let other = dir.path().join("other.safetensors");
    let mark = vec![(LAYOUT.0, LAYOUT.1.to_string())];
    let open = |change: &dyn Fn(&mut Vec<Entry>), metadata: &[(&str, String)]| {
        let mut entries = entries.clone();
        change(&mut entries);
        safetensors::write(&other, &entries, metadata).unwrap();
        let known = Known::open(&gpt, &other)?;
        known.check(&gpt.model, &built(&gpt, "gptq"))?;
        known.all()
    };
    let of = |entries: &mut Vec<Entry>, name: &str| entries.iter().position(|e| e.name == name).unwrap();
    assert!(open(&|_| (), &mark).is_ok());
    says(open(&|_| (), &[]), &["other.safetensors", "no file of statistics"]);
    says(open(&|e| e.clear(), &mark), &["no statistics of the inputs of", "0.q", "0.gate"]);
    let part = |e: &mut Vec<Entry>| e.retain(|e| !e.name.starts_with("1.down"));
    says(open(&part, &mark), &["no statistics of the inputs of 1.down;", "--skip"]);
    let peak = |e: &mut Vec<Entry>| e.retain(|e| e.name != "0.o.peak");
    says(open(&peak, &mark), &["0.o.peak", "is missing"]);
    let narrow = |e: &mut Vec<Entry>| {
        let at = of(e, "0.o.gram");
        e[at].shape = vec![3];
        e[at].bytes = Bytes::from_vec(vec![0; 24]);
    };
    says(open(&narrow, &mark), &["0.o.gram", "of another model"]);
    let kind = |e: &mut Vec<Entry>| {
        let at = of(e, "0.q.tokens");
        e[at].dtype = Dtype::I64;
    };
    says(open(&kind, &mark), &["0.q.tokens", "U64"]);
    let fill = |name: &'static str, byte: u8| {
        move |e: &mut Vec<Entry>| {
            let at = e.iter().position(|e| e.name == name).unwrap();
            e[at].bytes = Bytes::from_vec(vec![byte; e[at].bytes.len()]);
        }
    };
    says(open(&fill("0.q.tokens", 0), &mark), &["0.q", "no token was seen"]);
    says(open(&fill("0.up.gram", 0xff), &mark), &["0.up", "not finite"]);
    // It fits, and says that it is not of these files.
    open(&|_| (), &[mark[0].clone(), ("model", "another".into())]).unwrap();
    let notes = Known::open(&gpt, &other).unwrap().notes(&gpt, &built(&gpt, "gptq")).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("other files"), "{notes:?}");
}

#[test]
fn an_importance_matrix_must_be_of_this_model() {
    let dir = tempfile::tempdir().unwrap();
    let gpt = sample(dir.path());
    let path = dir.path().join("i.gguf");
    gather(&gpt, &texts(), "text", &path, &Silent).unwrap();
    let whole = Imatrix::read(&path).unwrap();
    let open = |change: &dyn Fn(&mut Imatrix)| {
        let mut all = whole.clone();
        change(&mut all);
        all.write(&path).unwrap();
        let known = Known::open(&gpt, &path)?;
        known.check(&gpt.model, &built(&gpt, "imatrix"))?;
        known.notes(&gpt, &built(&gpt, "imatrix"))
    };
    let named = |part: &str| whole.entries.keys().find(|k| k.contains(part)).unwrap().clone();
    let (down, query) = (named("1.ffn_down"), named("0.attn_q"));
    assert!(open(&|_| ()).unwrap().is_empty());
    says(open(&|all| all.entries.clear()), &["holds no matrix of this model"]);
    says(open(&|all| drop(all.entries.remove(&down))), &["1.down", "--skip"]);
    says(open(&|all| all.entries.get_mut(&down).unwrap().sums.truncate(9)), &[&down, "of another model"]);
    says(open(&|all| all.entries.get_mut(&down).unwrap().counts = vec![0.0]), &["1.down"]);
    // Keys and values read what queries read.
    assert!(open(&|all| drop(all.entries.remove(&query))).unwrap().is_empty());
    // llama.cpp leaves out the head, and a table that is the head as well.
    let notes = open(&|all| all.entries.retain(|name, _| name.contains("ffn") || name.contains("attn"))).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("rounded to nearest"), "{notes:?}");
    for (ending, words) in [("dat", "not written"), ("txt", "no file of statistics")] {
        says(gather(&gpt, &texts(), "", &dir.path().join(format!("x.{ending}")), &Silent), &[words]);
    }
    says(gather(&gpt, &[], "", &path, &Silent), &["--data FILE"]);
}
