//! What takes numbers of a model away: factors, and neurons, heads, layers and channels that are gone.

use crate::{fails, json, kill_again_and_again, path, planish, sample};
use serde_json::Value;
use std::{fs, path::Path, time::Instant};

fn words<'a>(command: &'a str, folder: &'a str, text: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let all = [command, folder, "--data", text, "--calibration-tokens", "8192", "--force"];
    [&all[..], more].concat()
}

fn divergence(outcome: &Value) -> f64 {
    outcome["proof"]["after"]["against"]["kl_mean"].as_f64().unwrap()
}

/// A dry run says what the result will be: within 5 %, in the file and for each token.
fn as_foreseen(words: &[&str], out: &str) -> Value {
    let foreseen = json(&[words, &["--dry-run"]].concat());
    let outcome = json(&[words, &["--out", out]].concat());
    let shown = json(&["inspect", out]);
    let near = |a: f64, b: f64, what: &str| assert!((a / b - 1.0).abs() < 0.05, "{what}: {a} foreseen, {b} found");
    let size = foreseen["size_bytes"].as_f64().unwrap();
    near(size, shown["size_bytes"].as_f64().unwrap(), "size");
    near(size, outcome["proof"]["after"]["file_bytes"].as_f64().unwrap(), "file");
    let read = |w: &Value| w["bytes"].as_f64().unwrap();
    let sum: f64 = foreseen["sites"].as_array().unwrap().iter().map(read).sum();
    let found: f64 = shown["sites"].as_array().unwrap().iter().map(read).sum();
    near(sum, found, "bytes of matrices");
    // What a fresh process reads for a token.
    let timed = json(&["bench", out, "--prefill", "8", "--decode", "4", "--runs", "1"]);
    let read = |v: &Value| v.as_f64().unwrap();
    near(read(&foreseen["bytes_per_token"]), read(&timed["work"]["bytes_per_token"]), "bytes of a token");
    outcome
}

#[test]
fn factors_take_the_room_that_was_foreseen_and_lose_less_where_they_know_the_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let run = |method: &str, out: &str| {
        let words = words("factorize", &folder, &text, &["--method", method, "--parameters", "90%"]);
        divergence(&as_foreseen(&words, &path(&dir, out)))
    };
    let (plain, scaled, whitened) = (run("svd", "plain"), run("asvd", "scaled"), run("svd-llm", "whitened"));
    let counted = run("gfwsvd", "counted");
    println!("svd {plain}, asvd {scaled}, svd-llm {whitened}, gfwsvd {counted}");
    assert!(whitened < 0.5 * plain && scaled < plain, "{plain} {scaled} {whitened}");
    assert!(counted < 0.1 * whitened, "{counted} {whitened}");

    // It runs packed as well, is read again, and goes to others multiplied out.
    let thin = path(&dir, "whitened");
    let fast = json(&["evaluate", &thin, "--data", &text, "--against", &thin, "--fast", "--documents", "5"]);
    assert!(fast["against"]["kl_mean"].as_f64().unwrap() < 1e-4, "{fast}");
    let gguf = path(&dir, "whole.gguf");
    let out = json(&["export", &thin, "--to", "gguf", "--type", "f32", "--out", &gguf]);
    assert!(out["notes"].to_string().contains("multiplied out"), "{out}");
    let alike = json(&["evaluate", &gguf, "--data", &text, "--against", &thin, "--documents", "5"]);
    assert!(alike["against"]["kl_mean"].as_f64().unwrap() < 1e-8, "{alike}");
    fails(&words("factorize", &folder, &text, &["--out", &path(&dir, "x.gguf")]), 2, "planish export");
    fails(&words("factorize", &folder, &text, &["--out", "x", "--parameters", "150%"]), 2, "at most 1");

    // Factors are rounded as matrices are.
    let small = path(&dir, "small");
    let rounded = words("quantize", &thin, &text, &["--method", "gptq", "--storage", "int8g32", "--out", &small]);
    let loss = divergence(&json(&rounded));
    assert!(loss < 2e-3, "{loss}");
    let shown = json(&["inspect", &small]);
    assert!(shown["sites"].to_string().contains("of int8g32"), "{shown}");
}

#[test]
fn what_rounding_leaves_is_kept_beside_it_and_the_bytes_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let all = |method: &'static str, more: &[&'static str]| {
        let words = words("quantize", &folder, &text, &["--method", method, "--storage", "int2g32"]);
        words.into_iter().chain(more.iter().copied()).map(String::from).collect::<Vec<_>>()
    };
    let to = |words: &[String], out: &str| {
        let out = path(&dir, out);
        let words: Vec<&str> = words.iter().map(String::as_str).chain(["--out", &out]).collect();
        divergence(&json(&words))
    };
    let lqer = all("lqer", &["--option", "rank=8"]);
    let begin = Instant::now();
    let (with, without) = (to(&lqer, "with"), to(&all("gptq", &[]), "without"));
    let time = begin.elapsed();
    println!("gptq {without}, lqer {with}");
    assert!(with < 0.85 * without, "{with} {without}");
    to(&[lqer.clone(), ["--threads", "1"].map(String::from).to_vec()].concat(), "one");
    let killed = path(&dir, "killed");
    let again: Vec<&str> = lqer.iter().map(String::as_str).chain(["--out", &killed]).collect();
    kill_again_and_again(&again, 4, time);
    assert!(planish().args(&again).output().unwrap().status.success());
    for other in ["one", "killed"] {
        for name in ["model.safetensors", "manifest.json"] {
            let read = |out: &str| fs::read(Path::new(&path(&dir, out)).join(name)).unwrap();
            assert!(read("with") == read(other), "{name} of {other} differs");
        }
    }
    fails(&[&again[..], &["--option", "method='distill'"]].concat(), 2, "matrix by matrix");
}

#[test]
fn what_is_pruned_is_gone_and_the_rest_makes_up_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let before = json(&["inspect", &folder]);
    let run = |pattern: &str, method: &str, sparsity: &str, out: &str| {
        let more = ["--pattern", pattern, "--method", method, "--sparsity", sparsity];
        divergence(&as_foreseen(&words("prune", &folder, &text, &more), &path(&dir, out)))
    };
    let count = |out: &str, what: &str| json(&["inspect", &path(&dir, out)])[what].as_u64().unwrap();
    let [hidden, kv_heads, layers] = ["hidden", "kv_heads", "blocks"].map(|what| before[what].as_u64().unwrap());

    let losses = ["magnitude", "wanda", "sparsegpt", "fisher", "taylor"].map(|m| run("neurons", m, "25%", m));
    println!("neurons: magnitude, wanda, sparsegpt, fisher, taylor {losses:?}");
    assert!(losses[4] < losses[0], "{losses:?}");
    assert!(losses[2] < losses[1] && losses[1] < losses[0] && losses[3] < losses[1], "{losses:?}");
    assert_eq!(count("wanda", "hidden"), hidden * 3 / 4);
    let heads = ["magnitude", "sparsegpt"].map(|method| run("heads", method, "50%", &format!("heads-{method}")));
    println!("heads: magnitude, sparsegpt {heads:?}");
    assert!(heads[1] < heads[0], "{heads:?}");
    assert_eq!(count("heads-sparsegpt", "kv_heads"), kv_heads.div_ceil(2));
    let shorter = format!("{}%", 100 / layers);
    let short = ["influence", "without"].map(|method| run("layers", method, &shorter, &format!("layers-{method}")));
    println!("layers: influence, without {short:?}");
    assert!(short[1] <= short[0], "{short:?}");
    assert_eq!(count("layers-without", "blocks"), layers - 1);

    let out = path(&dir, "x");
    let refused = |more: &[&str], says: &str| {
        fails(&[words("prune", &folder, &text, more), vec!["--out", &out]].concat(), 2, says);
    };
    refused(&["--pattern", "noses"], "neurons, heads, layers, width");
    refused(&["--pattern", "layers", "--method", "wanda"], "without, influence");
    refused(&["--pattern", "layers", "--sparsity", "1%"], "to remove one");
    refused(&["--heal", "many"], "500k or 2M");
    refused(&["--option", "distill.lr=1e-3"], "--heal");
}

#[test]
fn every_matrix_says_what_is_left_of_it_and_what_that_costs() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let run = |command: &str, more: &[&str], out: &str| -> Value {
        let out = path(&dir, out);
        let made = json(&[words(command, &folder, &text, more), vec!["--out", &out]].concat());
        assert!(fs::read_to_string(Path::new(&out).join("report.html")).unwrap().contains("<th>cost</th>"));
        made["proof"]["sites"].clone()
    };
    let of = |sites: &Value, site: &str| {
        sites
            .as_array()
            .unwrap()
            .iter()
            .find(|s| s["site"] == site)
            .unwrap_or_else(|| panic!("{site}: {sites}"))
            .clone()
    };
    let part =
        |site: &Value, what: &str| site["after"][what].as_f64().unwrap() / site["before"][what].as_f64().unwrap();
    let thin = run("prune", &["--pattern", "unstructured", "--sparsity", "50%", "--rates", "even"], "thin");
    let q = of(&thin, "0.q");
    assert!((part(&q, "values") - 0.5).abs() < 1e-3 && part(&q, "bytes") < 0.6, "{q}");
    assert!(q["cost"].as_f64().unwrap() > 1e-4 && q["cost"].as_f64().unwrap() < 0.2, "{q}");
    assert_eq!(of(&thin, "embed")["cost"], 0.0);
    // What fewer rows cost is told where they are read.
    let narrow = run("prune", &["--pattern", "neurons", "--sparsity", "50%"], "narrow");
    assert!(
        of(&narrow, "1.up")["cost"].is_null() && of(&narrow, "1.down")["cost"].as_f64().unwrap() > 1e-3,
        "{narrow}"
    );
    assert!((part(&of(&narrow, "1.down"), "values") - 0.5).abs() < 1e-9);
    let short = run("prune", &["--pattern", "layers", "--sparsity", "34%"], "short");
    let gone = short.as_array().unwrap().iter().filter(|s| s["after"].is_null()).count();
    assert_eq!(gone, 7, "{short}");
    let stays = short.as_array().unwrap().iter().filter(|s| !s["after"].is_null());
    stays.for_each(|s| assert_eq!(s["cost"], 0.0, "{s}"));
    // What a norm took over is no error.
    let smooth = run("quantize", &["--method", "smoothquant,gptq", "--storage", "int8g32"], "smooth");
    assert!(of(&smooth, "0.q")["cost"].as_f64().unwrap() < 1e-3, "{smooth}");
}

#[test]
fn rates_follow_what_matrices_cost_and_rounds_learn_in_between() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let run = |rates: &str| {
        let more = ["--pattern", "unstructured", "--sparsity", "60%", "--rates", rates];
        let out = path(&dir, rates);
        let loss = divergence(&as_foreseen(&words("prune", &folder, &text, &more), &out));
        (loss, json(&["inspect", &out])["size_bytes"].as_f64().unwrap())
    };
    let (even, owl, loss) = (run("even"), run("owl"), run("loss"));
    println!("60 % gone, evenly, by outliers, by loss: {even:?} {owl:?} {loss:?}");
    // Its text is nearly certain, which gradients tell little of: models of real texts lose much less (see the README).
    assert!(loss.0 < 5.0 * even.0 && owl.0 < 5.0 * even.0, "{even:?} {owl:?} {loss:?}");
    assert!((owl.1 / even.1 - 1.0).abs() < 5e-3 && (loss.1 / even.1 - 1.0).abs() < 5e-3, "{even:?} {owl:?} {loss:?}");

    // On a model of real text it loses much less than an even rate.
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let shared = std::env::var_os("PLANISH_DATA").map_or(shared, Into::into);
    let (real, own) = (shared.join("models/tinygpt-shakespeare-hf"), shared.join("text/tinyshakespeare/input.txt"));
    if real.is_dir() && own.is_file() {
        let text = path(&dir, "plays.txt");
        fs::write(&text, fs::read_to_string(own).unwrap().get(..300_000).unwrap()).unwrap();
        let run = |rates: &str| {
            let more = ["--pattern", "unstructured", "--sparsity", "50%", "--rates", rates];
            let out = path(&dir, &format!("plays-{rates}"));
            divergence(&json(&[words("prune", real.to_str().unwrap(), &text, &more), vec!["--out", &out]].concat()))
        };
        let (even, loss) = (run("even"), run("loss"));
        println!("half of tinygpt-shakespeare gone, evenly {even}, by loss {loss}");
        assert!(loss < 0.85 * even, "{even} {loss}");
    } else {
        println!("skipped in part: needs ../shared/data");
    }

    let grown = path(&dir, "grown");
    let more = [
        "--pattern",
        "unstructured",
        "--sparsity",
        "80%",
        "--rates",
        "even",
        "--rounds",
        "2",
        "--schedule",
        "linear",
        "--heal",
        "40k",
    ];
    let slowly = divergence(&json(&[words("prune", &folder, &text, &more), vec!["--out", &grown]].concat()));
    let recipe = fs::read_to_string(Path::new(&grown).join("planish.toml")).unwrap();
    let steps: Vec<&str> = recipe.lines().filter(|l| l.starts_with("method")).collect();
    assert_eq!(steps.len(), 4, "{recipe}");
    assert!(recipe.contains("bf16@40%") && recipe.contains("bf16@80%"), "{recipe}");
    let at_once = path(&dir, "at-once");
    let more = ["--pattern", "unstructured", "--sparsity", "80%", "--rates", "even"];
    let at_once = divergence(&json(&[words("prune", &folder, &text, &more), vec!["--out", &at_once]].concat()));
    println!("80 % gone in two rounds {slowly}, at once and not healed {at_once}");
    assert!(slowly < 0.7 * at_once, "{slowly} {at_once}");
    let refused = |more: &[&str], says: &str| {
        fails(&[words("prune", &folder, &text, more), vec!["--out", "x"]].concat(), 2, says)
    };
    refused(&["--pattern", "2:4", "--rates", "owl"], "same everywhere");
    refused(&["--pattern", "neurons", "--rates", "owl"], "single values");
    refused(&["--pattern", "neurons", "--rounds", "3"], "--heal");
    refused(&["--rounds", "3", "--heal", "10k", "--schedule", "fast"], "cubic");
}

/// A model whose weights are most of what a process holds, and learned nothing.
fn large(dir: &tempfile::TempDir) -> (String, String) {
    let (folder, text) = sample(dir);
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 256,
        "tie_word_embeddings": false,
    });
    fs::write(Path::new(&folder).join("config.json"), config.to_string()).unwrap();
    let config = model::Config::new(Path::new("config.json"), config.as_object().unwrap().clone());
    let model = model::Model::fresh(config, 1).unwrap();
    model::save::directory(&model, Path::new(&folder)).unwrap();
    (folder, text)
}

#[test]
fn memory_and_files_fall_by_as_much_as_was_foreseen() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = large(&dir);
    // One thread: how much of the file two of them have in hand at once differs from run to run.
    let timed = |model: &str| {
        let timed = json(&["bench", model, "--threads", "1", "--prefill", "8", "--decode", "4", "--runs", "1"]);
        timed["peak_rss_bytes"].as_f64().unwrap()
    };
    let size = |model: &str| json(&["inspect", model])["size_bytes"].as_f64().unwrap();
    let (before, held) = (size(&folder), timed(&folder));
    for (command, more) in [
        ("prune", &["--pattern", "neurons", "--sparsity", "50%", "--method", "magnitude"][..]),
        ("prune", &["--pattern", "2:4", "--method", "magnitude"]),
        ("factorize", &["--parameters", "50%", "--method", "svd"]),
    ] {
        let out = path(&dir, "out");
        let words = words(command, &folder, &text, more);
        let foreseen = json(&[&words[..], &["--dry-run"]].concat())["size_bytes"].as_f64().unwrap();
        as_foreseen(&words, &out);
        let after = timed(&out);
        let (fell, expected) = (held - after, before - foreseen);
        println!("{command} {more:?}: {held} to {after} bytes held, {fell} less, {expected} foreseen");
        assert!(expected > 0.2 * before, "{command} {more:?}: {expected} of {before}");
        assert!(
            (fell - expected).abs() < 0.05 * held,
            "{command} {more:?}: {fell} less, {expected} foreseen of {held}"
        );
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn what_was_pruned_or_factorized_heals() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let run = |command: &str, more: &[&str], out: &str| {
        let out = path(&dir, out);
        divergence(&json(&[words(command, &folder, &text, more), vec!["--out", &out]].concat()))
    };
    let heal = ["--heal", "60k"];
    for (command, more) in [
        ("prune", &["--pattern", "neurons", "--sparsity", "50%"][..]),
        ("factorize", &["--parameters", "50%", "--storage", "f32"]),
    ] {
        let broken = run(command, more, "broken");
        let healed = run(command, &[more, &heal[..]].concat(), "healed");
        println!("{command}: {broken} without healing, {healed} with");
        assert!(healed < 0.6 * broken, "{command}: {healed} {broken}");
        let shown = json(&["inspect", &path(&dir, "healed")]);
        assert_eq!(shown["parameters"], json(&["inspect", &path(&dir, "broken")])["parameters"]);
        ["broken", "healed"].iter().for_each(|out| fs::remove_dir_all(path(&dir, out)).unwrap());
    }
}

#[test]
fn single_values_leave_holes_that_stay_and_are_read_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let run = |pattern: &str, more: &[&str], out: &str| {
        let all = words("prune", &folder, &text, &[&["--pattern", pattern][..], more].concat());
        divergence(&as_foreseen(&all, &path(&dir, out)))
    };
    let half = ["--sparsity", "50%", "--rates", "even"];
    let losses =
        ["magnitude", "wanda", "sparsegpt"].map(|m| run("unstructured", &[&half[..], &["--method", m]].concat(), m));
    let paper = run("unstructured", &[&half[..], &["--option", "reconstruct=false"]].concat(), "paper");
    println!("unstructured: magnitude, wanda, sparsegpt {losses:?}, as in the paper {paper}");
    assert!(losses[1] < losses[0] && losses[2] < losses[0] && losses[2] < 0.9 * paper, "{losses:?} {paper}");
    let storages = |out: &str| json(&["inspect", &path(&dir, out)])["sites"].to_string();
    assert!(storages("sparsegpt").contains("@50%"));

    // Where a pattern takes as much as it leaves out, the plan says so.
    let little = ["--pattern", "unstructured", "--sparsity", "25%", "--storage", "int4g64", "--dry-run"];
    let told = json(&words("prune", &folder, &text, &little));
    assert!(told["notes"].to_string().contains("decodes no faster"), "{told}");

    // Sparse and low-bit together, in one step and in two; a layer that stays.
    let one = run("2:4", &["--storage", "int4g32", "--keep", "0"], "one");
    assert!(
        storages("one").contains("int4g32@2:4") && !storages("one").contains("\"0.q\",\"storage\":\"int4g32@2:4\"")
    );
    run("2:4", &[], "pairs");
    let two = path(&dir, "two");
    let pairs = path(&dir, "pairs");
    let all = words(
        "quantize",
        &pairs,
        &text,
        &["--method", "gptq", "--storage", "int4g32", "--skip", "embed", "--out", &two],
    );
    json(&all);
    assert!(storages("two").contains("int4g32@2:4"), "{}", storages("two"));
    println!("2:4 and four bits: {one}");

    // The runtime reads what is there, and says the same.
    let fast = json(&["evaluate", &two, "--data", &text, "--against", &two, "--fast", "--documents", "5"]);
    assert!(fast["against"]["kl_mean"].as_f64().unwrap() < 2e-3, "{fast}");
    // Others get zeros, or a refusal.
    let gguf = path(&dir, "filled.gguf");
    let out = json(&["export", &pairs, "--to", "gguf", "--type", "f32", "--out", &gguf]);
    assert!(out["notes"].to_string().contains("zeros"), "{out}");
    let alike = json(&["evaluate", &gguf, "--data", &text, "--against", &pairs, "--documents", "5"]);
    assert!(alike["against"]["kl_mean"].as_f64().unwrap() < 1e-8, "{alike}");
    fails(&words("prune", &folder, &text, &["--pattern", "2:4", "--out", &path(&dir, "x.gguf")]), 2, "GGUF type");
    let dense = path(&dir, "dense.gguf");
    json(&words("prune", &folder, &text, &["--pattern", "2:4", "--dense", "--out", &dense]));

    // Healed, the holes are where they were.
    let healed = path(&dir, "healed");
    let heal = ["--pattern", "2:4", "--heal", "40k", "--option", "distill.lr=1e-3", "--out", &healed];
    let after = divergence(&json(&words("prune", &folder, &text, &heal)));
    let before =
        divergence(&json(&words("prune", &folder, &text, &["--pattern", "2:4", "--out", &pairs, "--overwrite"])));
    println!("2:4: {before}, healed {after}");
    assert!(after < 0.7 * before, "{before} {after}");
    assert!(storages("healed").contains("@2:4"));

    fails(
        &words("prune", &folder, &text, &["--pattern", "2:4", "--sparsity", "50%", "--out", "x"]),
        2,
        "leave out --sparsity",
    );
    fails(&words("prune", &folder, &text, &["--pattern", "4:2", "--out", "x"]), 2, "16x1");
    fails(
        &words("prune", &folder, &text, &["--pattern", "2:4", "--storage", "q4_k", "--out", "x"]),
        2,
        "cannot have holes",
    );
    fails(
        &words("prune", &folder, &text, &["--pattern", "neurons", "--storage", "int4", "--out", "x"]),
        2,
        "single values",
    );
}

#[test]
fn levels_of_a_matrixs_own_are_closer_and_their_file_is_smaller() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let run = |words: &[&str], out: &str| {
        let out = path(&dir, out);
        let outcome = json(&[words, &["--out", &out]].concat());
        (divergence(&outcome), outcome["proof"]["after"]["file_bytes"].as_u64().unwrap())
    };
    let rounded = run(&words("quantize", &folder, &text, &["--method", "gptq", "--storage", "int3g32"]), "rounded");
    let cluster = words("cluster", &folder, &text, &["--bits", "3", "--group", "32"]);
    let foreseen = as_foreseen(&cluster, &path(&dir, "plain"));
    let plain = (divergence(&foreseen), foreseen["proof"]["after"]["file_bytes"].as_u64().unwrap());
    let coded = run(&[&cluster[..], &["--entropy-code"]].concat(), "coded");
    println!("int3g32 {rounded:?}, palette3g32 {plain:?}, entropy-coded {coded:?}");
    assert_eq!(coded.0, plain.0);
    assert!(coded.1 < rounded.1 * 98 / 100 && plain.1 < rounded.1 * 102 / 100, "{plain:?} {coded:?} {rounded:?}");

    // Matrices are nearer to what they were.
    let error = |out: &str| {
        let out = path(&dir, out);
        let told = planish().args(["audit", &out, "--against", &folder, "--json"]).output();
        let told: Value = serde_json::from_slice(&told.unwrap().stdout).unwrap();
        told["audit"]["matrices"].as_array().unwrap().iter().filter_map(|m| m["error"].as_f64()).sum::<f64>()
    };
    let (of_plain, of_rounded) = (error("plain"), error("rounded"));
    println!("errors of matrices: {of_plain} with their own levels, {of_rounded} with even ones");
    assert!(of_plain < 0.9 * of_rounded, "{of_plain} {of_rounded}");

    // What is unfolded is what was folded, packed too; the same bytes from one thread.
    let (plain, coded) = (path(&dir, "plain"), path(&dir, "coded"));
    let alike = json(&["evaluate", &coded, "--data", &text, "--against", &plain, "--documents", "5"]);
    assert!(alike["against"]["kl_mean"].as_f64().unwrap() == 0.0, "{alike}");
    let fast = json(&["evaluate", &coded, "--data", &text, "--against", &coded, "--fast", "--documents", "5"]);
    assert!(fast["against"]["kl_mean"].as_f64().unwrap() < 1e-3, "{fast}");
    run(&[&cluster[..], &["--entropy-code", "--threads", "1"]].concat(), "one");
    let read = |out: &str| fs::read(Path::new(&path(&dir, out)).join("model.safetensors")).unwrap();
    assert!(read("one") == read("coded"), "one thread writes other bytes");
    assert!(planish().args(["verify", &coded]).output().unwrap().status.success());

    // A damaged file is told.
    let file = Path::new(&coded).join("model.safetensors");
    let mut bytes = read("coded");
    let end = bytes.len();
    bytes[end - 40_000..end - 39_000].fill(0xff);
    fs::write(&file, bytes).unwrap();
    fails(&["inspect", &coded], 2, "damaged");

    // A sparse model that is clustered stays sparse.
    let sparse = path(&dir, "sparse");
    json(&words("prune", &folder, &text, &["--pattern", "2:4", "--out", &sparse]));
    let both = path(&dir, "both");
    json(&words("cluster", &sparse, &text, &["--bits", "3", "--group", "32", "--entropy-code", "--out", &both]));
    let shown = json(&["inspect", &both])["sites"].to_string();
    assert!(shown.contains("palette3g32@2:4"), "{shown}");
    // Codes and scales learn on the levels that were chosen, with holes too.
    let two = words("cluster", &folder, &text, &["--bits", "2", "--group", "32"]);
    let (before, after) =
        (run(&two, "two"), run(&[&two[..], &["--heal", "80k", "--option", "distill.lr=2e-3"]].concat(), "healed"));
    println!("palette2g32 {before:?}, healed {after:?}");
    assert!(after.0 < 0.5 * before.0 && after.1 == before.1, "{before:?} {after:?}");
    // What is not there is not there while it learns either, though two bits have no level for zero.
    let two = words("cluster", &sparse, &text, &["--bits", "2", "--group", "32"]);
    let heal = [&two[..], &["--heal", "40k", "--option", "distill.lr=2e-3"]].concat();
    let (before, after) = (run(&two, "sparse-two"), run(&heal, "sparse-healed"));
    println!("palette2g32@2:4 {before:?}, healed {after:?}");
    assert!(after.0 < 0.65 * before.0 && after.1 == before.1, "{before:?} {after:?}");
    let shown = json(&["inspect", &path(&dir, "sparse-healed")])["sites"].to_string();
    assert!(shown.contains("palette2g32@2:4"), "{shown}");
    // A clustered model that is quantized stays clustered: each level of a group becomes one code.
    let eight = path(&dir, "eight");
    let words_of = ["--method", "rtn", "--storage", "int8g32", "--requantize", "--out", &eight];
    let same = divergence(&json(&words("quantize", &plain, &text, &words_of)));
    assert!(same < 1e-4, "{same}");
    fails(&words("cluster", &folder, &text, &["--bits", "9", "--out", "x"]), 2, "palette<1..8>");
    fails(
        &words("cluster", &folder, &text, &["--entropy-code", "--format", "gguf", "--out", "x"]),
        2,
        "leave out --format",
    );
}
