//! Models of some of the channels of others: what is left out adds nothing, so nothing may change.
#![allow(clippy::unwrap_used, clippy::panic)]

use model::{Channels, Model, Role, Site, Widths, load, save};
use std::path::Path;
use tensor::{Tensor, Weight};

/// A family each: fused matrices, transposed ones, heads interleaved, parallel blocks, norms after, norms of heads.
const NAMES: [&str; 6] = ["llama-gqa-tied", "gpt2", "gemma3", "neox", "phi3", "qwen3-tied"];

/// The model in 32-bit floats.
fn golden(name: &str) -> Model {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut model = load::open(&root.join(name)).unwrap().model;
    model.linears.values_mut().for_each(|l| l.weight = Weight::from_tensor(l.weight.to_tensor()));
    model
}

fn logits(model: &Model) -> Tensor {
    let ids: Vec<u32> = (0..12).map(|i| i * 7 % model.spec.vocab as u32).collect();
    model.forward(&[&ids], &mut ()).unwrap()
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    let scale = a.as_slice().iter().fold(0f32, |m, v| m.max(v.abs()));
    a.as_slice().iter().zip(b.as_slice()).all(|(x, y)| (x - y).abs() <= 1e-4 * scale)
}

fn change(model: &mut Model, site: Site, f: impl Fn(usize, usize, &mut f32)) {
    let linear = model.linears.get_mut(&site).unwrap();
    let mut values = linear.weight.to_tensor();
    for row in 0..values.rows() {
        values.row_mut(row).iter_mut().enumerate().for_each(|(col, v)| f(row, col, v));
    }
    linear.weight = Weight::from_tensor(values);
}

#[test]
fn neurons_and_heads_that_say_nothing_may_go() {
    for name in NAMES {
        let mut model = golden(name);
        let b = model.spec.blocks[0].clone();
        let all = Channels::largest(&model, Widths::default()).unwrap();
        assert!(same(&logits(&model.of_channels(&all).unwrap()), &logits(&model)), "{name}: all channels");

        let kv_heads = (b.kv_heads > 1).then(|| b.kv_heads - 1);
        let widths = Widths { hidden: Some(b.hidden - 8), ..Widths::default() };
        let kept = Channels::largest(&model, widths).unwrap();
        let heads = Channels::largest(&model, Widths { kv_heads, ..widths }).unwrap();
        let each = b.head_dim * (b.heads / b.kv_heads);
        for layer in 0..model.spec.layers() {
            let at = usize::from(layer);
            let lost = |list: &[usize], i: usize| !list.contains(&i);
            change(&mut model, Site::of(layer, Role::Down), |_, col, v| {
                *v *= f32::from(u8::from(!lost(&kept.hidden[at], col)));
            });
            change(&mut model, Site::of(layer, Role::O), |_, col, v| {
                *v *= f32::from(u8::from(!lost(&heads.kv_heads[at], col / each)));
            });
        }
        let narrow = model.of_channels(&kept).unwrap();
        assert_eq!(narrow.spec.blocks[0].hidden, b.hidden - 8);
        assert!(narrow.parameters() < model.parameters());
        assert!(same(&logits(&narrow), &logits(&model)), "{name}: neurons");

        let dir = tempfile::tempdir().unwrap();
        let narrow = match model.of_channels(&heads) {
            Ok(fewer) => {
                assert!(same(&logits(&fewer), &logits(&model)), "{name}: heads");
                fewer
            }
            // There the width of heads follows from their number.
            Err(e) if ["gpt2", "neox", "phi3"].contains(&name) => {
                assert!(e.to_string().contains("cannot say"), "{name}: {e}");
                narrow
            }
            Err(e) => panic!("{name}: {e}"),
        };
        save::directory(&narrow, dir.path()).unwrap();
        let again = load::open(dir.path()).unwrap().model;
        assert_eq!(again.spec.blocks, narrow.spec.blocks);
        assert!(logits(&again) == logits(&narrow), "{name}: as it is read again");
    }
}

#[test]
fn channels_of_the_residual_stream_that_are_empty_may_go() {
    let mut model = golden("llama-gqa-tied");
    let (dim, kept) = (model.spec.dim, model.spec.dim - 8);
    let channels = Channels::largest(&model, Widths { dim: Some(kept), ..Widths::default() }).unwrap();
    let empty = |i: usize| !channels.dim.contains(&i);
    let writers = |layer| [Role::O, Role::Down].map(|role| Site::of(layer, role));
    for site in (0..model.spec.layers()).flat_map(writers) {
        change(&mut model, site, |row, _, v| *v *= f32::from(u8::from(!empty(row))));
    }
    change(&mut model, Site::EMBED, |_, col, v| *v *= f32::from(u8::from(!empty(col))));
    let mut narrow = model.of_channels(&channels).unwrap();
    // The mean of squares is over fewer channels now.
    let factor = (dim as f32 / kept as f32).sqrt();
    narrow.norms.values_mut().for_each(|norm| norm.scale.iter_mut().for_each(|v| *v *= factor));
    assert!(same(&logits(&narrow), &logits(&model)));
    assert_eq!(narrow.spec.dim, kept);
}

#[test]
fn channels_that_are_not_there_are_told() {
    let model = golden("llama-gqa-tied");
    let wide = Widths { hidden: Some(1 << 20), ..Widths::default() };
    assert!(Channels::largest(&model, wide).unwrap_err().to_string().contains("hidden=1048576"));
    let mut channels = Channels::largest(&model, Widths::default()).unwrap();
    channels.dim.swap(0, 1);
    assert!(model.of_channels(&channels).is_err_and(|e| e.to_string().contains("rising order")));
}
