//! `cargo bench -p planish-tensor --bench learning`: the products of a training step against the peak of this machine.
//!
//! Each shape is multiplied three ways, inputs packed each time: forth (`Y = X Wᵀ`), the gradient of its inputs
//! (`dX = dY W`) and that of its weights (`dW = dYᵀ X`). The shapes are 1024 x 1024 x 1024, and those of a step of
//! `benches/training/speed.py`, which are also summed up by their operations. Medians of seven rounds over all of them.

use std::time::Instant;
use tensor::{
    Linear, Tensor, Weight,
    kernels::{Arithmetic, kernels},
    limits,
    ops::{Columns, Operand, Target, products, weight_gradient},
    packed::{Form, InputKind, Inputs, Packed, Turn},
    threads,
};

const ROUNDS: usize = 7;
/// Tokens, inputs, outputs, and how often a step has the shape.
const SHAPES: [(usize, usize, usize, usize); 5] =
    [(1024, 1024, 1024, 0), (2048, 288, 288, 24), (2048, 288, 768, 12), (2048, 768, 288, 6), (2048, 288, 4096, 1)];

struct Shape {
    x: Operand,
    dy: Operand,
    straight: Linear,
    across: Linear,
    columns: Columns,
    rows: Inputs,
    gradient: Tensor,
    out: Tensor,
}

fn wave(rows: usize, cols: usize) -> Tensor {
    Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * 0.37).sin()).collect())
}

fn seconds(run: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    run();
    begin.elapsed().as_secs_f64()
}

impl Shape {
    fn new((tokens, inputs, outputs, _): (usize, usize, usize, usize), form: Form) -> Shape {
        let weight = wave(outputs, inputs);
        let packed = |turn| Linear::new(Weight::Packed(Packed::of(&weight, form, turn).expect("memory")));
        Shape {
            x: Operand::new(wave(tokens, inputs)),
            dy: Operand::new(wave(tokens, outputs)),
            straight: packed(Turn::Straight),
            across: packed(Turn::Across),
            columns: Columns::default(),
            rows: Inputs::default(),
            gradient: Tensor::zeros(outputs, inputs),
            out: Tensor::default(),
        }
    }

    /// Seconds of the three products.
    fn run(&mut self, form: Form) -> [f64; 3] {
        let Shape { x, dy, straight, across, columns, rows, gradient, out } = self;
        let forth = seconds(|| {
            x.values_mut();
            products(x, [Target { linear: straight, out }]);
        });
        let back = seconds(|| {
            dy.values_mut();
            products(dy, [Target { linear: across, out }]);
        });
        let weights = seconds(|| {
            columns.pack(x.values(), form);
            rows.pack_columns(dy.values(), InputKind::of(form, kernels()), kernels());
            weight_gradient(columns, rows, gradient);
        });
        [forth, back, weights]
    }
}

fn main() {
    for (name, form, arithmetic) in [("f32", Form::F32, Arithmetic::F32), ("bf16", Form::Bf16, Arithmetic::Bf16)] {
        let mut shapes = SHAPES.map(|shape| Shape::new(shape, form));
        let mut times = [const { [const { Vec::new() }; 3] }; SHAPES.len()];
        let mut peaks = Vec::new();
        for _ in 0..ROUNDS {
            peaks.push(limits::peak(arithmetic));
            for (shape, times) in shapes.iter_mut().zip(&mut times) {
                shape.run(form).into_iter().zip(times).for_each(|(t, times)| times.push(t));
            }
        }
        peaks.sort_by(f64::total_cmp);
        let peak = peaks[ROUNDS / 2];
        println!(
            "{name}: {} on {} threads, peak {:.0} Gop/s; share of it:",
            kernels().isa,
            threads::count(),
            peak / 1e9
        );
        let (mut all, mut spent) = (0.0, 0.0);
        for ((tokens, inputs, outputs, count), times) in SHAPES.into_iter().zip(times) {
            let work = 2.0 * (tokens * inputs * outputs) as f64;
            let [forth, back, weights] = times.map(|mut t| {
                t.sort_by(f64::total_cmp);
                t[ROUNDS / 2]
            });
            all += 3.0 * work * count as f64;
            spent += (forth + back + weights) * count as f64;
            let share = |time: f64| 100.0 * work / time / peak;
            println!(
                "{tokens:>5} x {inputs:>4} x {outputs:>4}   forth {:>5.1} %   inputs {:>5.1} %   weights {:>5.1} %",
                share(forth),
                share(back),
                share(weights)
            );
        }
        println!("a step's products, weighted by their operations: {:.1} %", 100.0 * all / spent / peak);
    }
}
