//! The words of [`Lanes`] in NEON: each is said four times, for four lanes each; `DOT` says whether the products of
//! signed bytes in fours (`sdot`) are there too.

use super::lanes::Lanes;
use std::arch::{aarch64::*, asm};

/// Sixteen lanes in four registers.
pub struct Neon<const DOT: bool>;

/// The expression for each of the four registers, as plain expressions: a closure would be compiled without the
/// instruction set.
macro_rules! four {
    ($i:ident => $e:expr) => {
        [
            {
                let $i = 0;
                $e
            },
            {
                let $i = 1;
                $e
            },
            {
                let $i = 2;
                $e
            },
            {
                let $i = 3;
                $e
            },
        ]
    };
}

/// Adds to each of four lanes the product of its four signed bytes with those of `x`.
///
/// # Safety
/// With `DOT` the processor has `sdot`.
#[inline(always)]
unsafe fn signed_dot<const DOT: bool>(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    if DOT {
        let mut sum = acc;
        // SAFETY: the caller's; `sdot` only reads and writes the registers that are named. It is written out since
        // its intrinsic is not stable.
        unsafe {
            asm!(
                "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
                sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        return sum;
    }
    // SAFETY: NEON belongs to every aarch64.
    unsafe {
        // Two products of -128 to 127 with -127 to 127 fit in 16 bits.
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        let high = vmull_high_s8(w, x);
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
}

/// Sixteen unsigned bytes as floats.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Lanes`] says.
#[inline(always)]
unsafe fn widen_unsigned(v: uint8x16_t) -> [float32x4_t; 4] {
    // SAFETY: NEON belongs to every aarch64.
    unsafe {
        let (low, high) = (vmovl_u8(vget_low_u8(v)), vmovl_high_u8(v));
        [
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
            vcvtq_f32_u32(vmovl_high_u16(low)),
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
            vcvtq_f32_u32(vmovl_high_u16(high)),
        ]
    }
}

/// Four rows of four words as four columns.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Lanes`] says.
#[inline(always)]
unsafe fn four_by_four(rows: [uint32x4_t; 4]) -> [uint64x2_t; 4] {
    // SAFETY: NEON belongs to every aarch64.
    unsafe {
        let [a, b, c, d] = rows;
        let even = [vreinterpretq_u64_u32(vtrn1q_u32(a, b)), vreinterpretq_u64_u32(vtrn1q_u32(c, d))];
        let odd = [vreinterpretq_u64_u32(vtrn2q_u32(a, b)), vreinterpretq_u64_u32(vtrn2q_u32(c, d))];
        [
            vtrn1q_u64(even[0], even[1]),
            vtrn1q_u64(odd[0], odd[1]),
            vtrn2q_u64(even[0], even[1]),
            vtrn2q_u64(odd[0], odd[1]),
        ]
    }
}

/// Where the bytes of a lane of eight come from whose bit is set: the first, the second ...; 255 elsewhere, which no table has.
static PLACES: [[u8; 8]; 256] = {
    let mut places = [[255; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut from, mut bit) = (0, 0);
        while bit < 8 {
            if mask >> bit & 1 == 1 {
                places[mask][bit] = from;
                from += 1;
            }
            bit += 1;
        }
        mask += 1;
    }
    places
};

/// Spreads what `read` makes of the number of bytes that were spread before, eight at a time.
///
/// # Safety
/// `read` may read what the mask asks for.
#[inline(always)]
unsafe fn spread(mask: u64, zero: u8, read: impl Fn(usize) -> uint8x8_t) -> [uint8x16_t; 4] {
    let mut from = 0;
    // SAFETY: NEON belongs to every aarch64, and the table has an entry for every byte.
    unsafe {
        let mut next = |i: usize| {
            let mask = (mask >> (8 * i) & 255) as usize;
            let places = vld1_u8(PLACES[mask].as_ptr());
            let there = vcombine_u8(read(from), vdup_n_u8(0));
            from += mask.count_ones() as usize;
            // Places beyond the table keep what is there.
            vqtbx1_u8(vdup_n_u8(zero), there, places)
        };
        four!(i => vcombine_u8(next(2 * i), next(2 * i + 1)))
    }
}

/// One half of what [`Lanes::uppermost`] reads.
///
/// # Safety
/// The processor has the instructions, and the pointer holds what [`Lanes`] says.
#[inline(always)]
unsafe fn upper_halves(p: *const u8) -> [float32x4_t; 4] {
    // SAFETY: as the function says.
    unsafe {
        four!(i => {
            let low = vshrq_n_u32::<24>(vreinterpretq_u32_u8(vld1q_u8(p.add(16 * i))));
            let high = vshrq_n_u32::<24>(vreinterpretq_u32_u8(vld1q_u8(p.add(64 + 16 * i))));
            vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vorrq_u32(low, vshlq_n_u32::<8>(high)))))
        })
    }
}

// SAFETY: every function is a few instructions of NEON (and `sdot` where asked for) on its arguments, and reads or
// writes what the trait says.
unsafe impl<const DOT: bool> Lanes for Neon<DOT> {
    type Bytes = [uint8x16_t; 4];
    type Ints = [int32x4_t; 4];
    type Floats = [float32x4_t; 4];
    // Both ways to multiply bytes take signed ones.
    const SIGNED: bool = true;
    const FUSED: bool = DOT;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [uint8x16_t; 4] {
        unsafe { four!(i => vld1q_u8(p.add(16 * i))) }
    }
    #[inline(always)]
    unsafe fn spread_bytes(p: *const u8, mask: u64, zero: u8) -> [uint8x16_t; 4] {
        unsafe { spread(mask, zero, |from| vld1_u8(p.add(from))) }
    }
    #[inline(always)]
    unsafe fn spread_nibbles(p: *const u8, mask: u64, zero: u8) -> [uint8x16_t; 4] {
        unsafe {
            spread(mask, zero, |from| {
                let data = p.add(from / 2).cast::<u64>().read_unaligned() >> (4 * (from % 2));
                let low = vcreate_u8(data & 0x0f0f_0f0f);
                let high = vcreate_u8(data >> 4 & 0x0f0f_0f0f);
                vzip1_u8(low, high)
            })
        }
    }
    #[inline(always)]
    unsafe fn transpose(rows: *const u8, stride: usize, out: *mut u8) {
        for first in (0..16).step_by(4) {
            for word in (0..16).step_by(4) {
                // SAFETY: four rows of sixteen bytes of the caller's, and as many of its output.
                unsafe {
                    let rows = rows.add(first * stride + 4 * word);
                    let columns = four_by_four(four!(i => vreinterpretq_u32_u8(vld1q_u8(rows.add(i * stride)))));
                    for i in 0..4 {
                        vst1q_u8(out.add(64 * (word + i) + 4 * first), vreinterpretq_u8_u64(columns[i]));
                    }
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn and(b: [uint8x16_t; 4], mask: u8) -> [uint8x16_t; 4] {
        unsafe { four!(i => vandq_u8(b[i], vdupq_n_u8(mask))) }
    }
    #[inline(always)]
    unsafe fn or(a: [uint8x16_t; 4], b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        unsafe { four!(i => vorrq_u8(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn down<const N: u32>(b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        unsafe { four!(i => vshlq_u8(b[i], vdupq_n_s8(-(N as i8)))) }
    }
    #[inline(always)]
    unsafe fn up<const N: u32>(b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        unsafe { four!(i => vshlq_u8(b[i], vdupq_n_s8(N as i8))) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        unsafe { four!(i => vqtbl1q_u8(vld1q_u8(table.as_ptr()), b[i])) }
    }
    #[inline(always)]
    unsafe fn dot(acc: [int32x4_t; 4], w: [uint8x16_t; 4], x: [int32x4_t; 4]) -> [int32x4_t; 4] {
        unsafe { four!(i => signed_dot::<DOT>(acc[i], vreinterpretq_s8_u8(w[i]), vreinterpretq_s8_s32(x[i]))) }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: [int32x4_t; 4], w: [uint8x16_t; 4], x: [int32x4_t; 4]) -> [int32x4_t; 4] {
        unsafe { Self::dot(acc, four!(i => veorq_u8(w[i], vdupq_n_u8(128))), x) }
    }
    #[inline(always)]
    unsafe fn select(first: *const u8, second: *const u8, from: [uint8x16_t; 4]) -> [int32x4_t; 4] {
        unsafe {
            let [first, second] = [first, second].map(|p| u64::from(p.cast::<u32>().read_unaligned()));
            let both = vreinterpretq_u8_u64(vdupq_n_u64(first | second << 32));
            four!(i => vreinterpretq_s32_u8(vqtbl1q_u8(both, from[i])))
        }
    }
    #[inline(always)]
    unsafe fn splat_int(p: *const u8) -> [int32x4_t; 4] {
        unsafe { [vdupq_n_s32(p.cast::<i32>().read_unaligned()); 4] }
    }
    #[inline(always)]
    unsafe fn ints(p: *const i32) -> [int32x4_t; 4] {
        unsafe { four!(i => vld1q_s32(p.add(4 * i))) }
    }
    #[inline(always)]
    unsafe fn ints_up<const N: u32>(a: [int32x4_t; 4]) -> [int32x4_t; 4] {
        unsafe { four!(i => vshlq_s32(a[i], vdupq_n_s32(N as i32))) }
    }
    #[inline(always)]
    unsafe fn to_floats(a: [int32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { four!(i => vcvtq_f32_s32(a[i])) }
    }
    #[inline(always)]
    unsafe fn to_ints(a: [float32x4_t; 4]) -> [int32x4_t; 4] {
        unsafe { four!(i => vcvtq_s32_f32(a[i])) }
    }
    #[inline(always)]
    unsafe fn zero() -> [float32x4_t; 4] {
        unsafe { [vdupq_n_f32(0.0); 4] }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [float32x4_t; 4] {
        unsafe { [vdupq_n_f32(p.cast::<f32>().read_unaligned()); 4] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [float32x4_t; 4] {
        unsafe { four!(i => vld1q_f32(p.add(4 * i))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: [float32x4_t; 4]) {
        unsafe {
            vst1q_f32(p, a[0]);
            vst1q_f32(p.add(4), a[1]);
            vst1q_f32(p.add(8), a[2]);
            vst1q_f32(p.add(12), a[3]);
        }
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> [float32x4_t; 4] {
        unsafe { four!(i => vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p.add(8 * i))))) }
    }
    #[inline(always)]
    unsafe fn uppermost(p: *const u8) -> [[float32x4_t; 4]; 2] {
        unsafe { [upper_halves(p), upper_halves(p.add(128))] }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> [float32x4_t; 4] {
        unsafe {
            let v = vreinterpretq_s8_u8(vld1q_u8(p));
            let (low, high) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> ([float32x4_t; 4], [float32x4_t; 4]) {
        unsafe {
            let v = vld1q_u8(p);
            (widen_unsigned(vandq_u8(v, vdupq_n_u8(15))), widen_unsigned(vshrq_n_u8::<4>(v)))
        }
    }
    #[inline(always)]
    unsafe fn sixes(p: *const u8, d: [float32x4_t; 4], m: [float32x4_t; 4]) -> [[float32x4_t; 4]; 4] {
        unsafe {
            let v: [uint32x4_t; 4] = four!(i => vreinterpretq_u32_u8(vld1q_u8(p.add(16 * i))));
            let low = vdupq_n_u32(63);
            let first = four!(i => vcvtq_f32_u32(vandq_u32(v[i], low)));
            let second = four!(i => vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<6>(v[i]), low)));
            let third = four!(i => vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<12>(v[i]), low)));
            let fourth = four!(i => vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<18>(v[i]), low)));
            [Self::mul(d, first), Self::mul(d, second), Self::negative_mul(m, third), Self::negative_mul(m, fourth)]
        }
    }
    #[inline(always)]
    unsafe fn add(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { four!(i => vaddq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn max(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // NEON's own maximum is not a number where either is not.
        unsafe { four!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn power(n: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe {
            four!(i => {
                let n = vaddq_s32(vcvtq_s32_f32(n[i]), vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(n))
            })
        }
    }
    #[inline(always)]
    unsafe fn mul(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { four!(i => vmulq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn negative_mul(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { four!(i => vfmsq_f32(vdupq_n_f32(0.0), a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn fma(a: [float32x4_t; 4], b: [float32x4_t; 4], c: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { four!(i => vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn brain_pair(w: [uint8x16_t; 4]) -> [[float32x4_t; 4]; 2] {
        unsafe {
            let upper = vdupq_n_u32(0xffff_0000);
            [
                four!(i => vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_u8(w[i])))),
                four!(i => vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(w[i]), upper))),
            ]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::generic_lanes::Generic;

    /// What `V` makes of bytes and inputs: every word but the fused ones, as bits.
    ///
    /// # Safety
    /// The processor has the instructions, and the pointers hold what [`Lanes`] says.
    unsafe fn words<V: Lanes>(w: &[u8; 64], x: [i8; 4]) -> Vec<u32> {
        let mut seen = Vec::new();
        let mut keep = |v: V::Floats| {
            let mut out = [0f32; 16];
            // SAFETY: as the function says.
            unsafe { V::store(out.as_mut_ptr(), v) };
            seen.extend(out.map(|f| if f.is_nan() { u32::MAX } else { f.to_bits() }));
        };
        // SAFETY: as the function says.
        unsafe {
            let (codes, x4) = (V::bytes(w.as_ptr()), V::splat_int(x.as_ptr().cast()));
            let none = V::to_ints(V::zero());
            let dot = |codes| V::to_floats(V::dot(none, V::and(codes, 127), x4));
            for moved in [codes, V::down::<1>(codes), V::down::<4>(codes), V::up::<3>(codes), V::up::<6>(codes)] {
                // Masked as bit planes are: what comes from a neighbour is gone.
                keep(dot(V::and(moved, 2)));
                keep(dot(V::or(V::and(moved, 8), V::and(codes, 1))));
            }
            keep(dot(codes));
            let levels = std::array::from_fn(|i| (37 * i % 128) as u8);
            keep(dot(V::lookup(&levels, V::and(codes, 15))));
            let offset = 128 * x.iter().map(|x| i32::from(*x)).sum::<i32>() * i32::from(V::SIGNED);
            let start = V::splat_int((&raw const offset).cast());
            keep(V::to_floats(V::dot_wide(start, codes, x4)));
            keep(V::to_floats(V::ints_up::<7>(x4)));
            // Numbers of whose sign and size nothing is lost.
            let (d, m) = (V::signed(w.as_ptr()), V::signed(w.as_ptr().add(16)));
            // The sign of a zero is left open: adding one makes it plus.
            V::sixes(w.as_ptr(), d, m).into_iter().for_each(|v| keep(V::add(v, V::zero())));
            V::uppermost(w.repeat(4).as_ptr()).into_iter().for_each(&mut keep);
            for at in [0, 16, 31] {
                let p = w.as_ptr().add(at);
                keep(V::halves(p));
                keep(V::signed(p));
                let (low, high) = V::nibbles(p);
                keep(low);
                keep(high);
                keep(V::power(V::signed([x[0].max(-126); 16].as_ptr().cast())));
                keep(V::max(V::halves(p), V::signed(p)));
                keep(V::max(V::signed(p), V::halves(p)));
                keep(V::add(V::halves(p), V::signed(p)));
                keep(V::mul(V::halves(p), V::signed(p)));
            }
        }
        seen
    }

    #[test]
    fn every_word_is_the_plain_one() {
        let inputs = [[127i8; 4], [-127; 4], [127, -127, 127, -127], [1, 0, -1, 90], [-126, 3, 5, 7]];
        for first in 0..=255u8 {
            let scattered = std::array::from_fn(|i| first.wrapping_add((i * i * 29) as u8));
            for w in [[first; 64], scattered] {
                for x in inputs {
                    // SAFETY: NEON belongs to every aarch64, and `sdot` is asked for where it is.
                    unsafe {
                        let want = words::<Generic>(&w, x);
                        assert_eq!(words::<Neon<false>>(&w, x), want, "{first} {x:?}");
                        if std::arch::is_aarch64_feature_detected!("dotprod") {
                            assert_eq!(with_dot(&w, x), want, "dot {first} {x:?}");
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// The processor has the instructions, and the pointers hold what [`Lanes`] says.
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn with_dot(w: &[u8; 64], x: [i8; 4]) -> Vec<u32> {
        // SAFETY: the caller asked for the instructions.
        unsafe { words::<Neon<true>>(w, x) }
    }

    #[test]
    fn rows_become_columns() {
        let stride = 67;
        let rows: Vec<u8> = (0..15 * stride + 64).map(|i| (i * i % 251) as u8).collect();
        let (mut out, mut want) = ([0u8; 1024], [0u8; 1024]);
        // SAFETY: sixteen rows of 64 bytes, and room for as many words.
        unsafe {
            Neon::<false>::transpose(rows.as_ptr(), stride, out.as_mut_ptr());
            Generic::transpose(rows.as_ptr(), stride, want.as_mut_ptr());
        }
        assert_eq!(out, want);
    }

    #[test]
    fn products_are_rounded_once() {
        let (a, b, c) = (1.0 + f32::EPSILON, 1.0 - f32::EPSILON, -1f32);
        // SAFETY: as the function says.
        let splat = |v: f32| unsafe { Neon::<false>::splat((&raw const v).cast()) };
        let mut out = [0f32; 16];
        // SAFETY: NEON belongs to every aarch64.
        unsafe {
            Neon::<false>::store(out.as_mut_ptr(), Neon::<false>::fma(splat(a), splat(b), splat(c)));
            assert_eq!(out, [a.mul_add(b, c); 16]);
            Neon::<false>::store(out.as_mut_ptr(), Neon::<false>::negative_mul(splat(a), splat(b)));
            assert_eq!(out, [-(a * b); 16]);
        }
    }
}
