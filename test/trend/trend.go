// Package trend says whether a figure that was sampled for an hour grows. It is what tells a leak
// from the noise of a garbage collector: a pure function of the samples.
//
// The line is Theil and Sen's: the median of the slopes between all pairs of samples. A sample in
// four may be anything without moving it much. Its interval is Sen's (1968), by the variance of
// Kendall's tau. That is for samples that know nothing of each other. Memory does: what was held a
// moment ago is mostly held now. So the variance is multiplied by what samples that remember their
// neighbour are worth, (1+r)/(1-r), where r is the correlation of the ranks of neighbours'
// residuals (as Yue and Wang, 2004, do for the test of Mann and Kendall).
//
// It knows nothing of steps. What grows once and stays is a step, and no leak.
package trend

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// Sample is one figure at its time since the beginning.
type Sample struct {
	At    time.Duration
	Value float64
}

// Limit is what a figure may have grown by over all of its samples, whichever is more.
type Limit struct {
	Share float64 // of its median
	Least float64 // in its own unit
}

// Verdict is what can be said of a figure.
type Verdict int

// What can be said.
const (
	Flat     Verdict = iota // no growth, or less than the limit
	Grows                   // surely, and by more than the limit
	TooNoisy                // it may have grown by twice the limit, or not at all: nobody can tell
)

func (v Verdict) String() string {
	return map[Verdict]string{Flat: "flat", Grows: "GROWS", TooNoisy: "TOO NOISY"}[v]
}

// Fit is the line through samples. Growth, Low and High are over all the time from the first sample
// to the last, in the figure's own unit.
type Fit struct {
	Verdict   Verdict
	N         int
	Span      time.Duration
	Median    float64
	Growth    float64
	Low, High float64 // 99 of 100 such intervals have the true growth in them
	Noise     float64 // the median distance of a sample from the line
	Memory    float64 // how much a sample knows of the one before, 0 to 1
	Allowed   float64
}

// PerHour is the slope.
func (f Fit) PerHour() float64 {
	if f.Span <= 0 {
		return 0
	}
	return f.Growth / f.Span.Hours()
}

func (f Fit) String() string {
	return fmt.Sprintf("%v: %+.4g in %v (99 %%: %+.4g to %+.4g), allowed %.4g of %.4g", f.Verdict,
		f.Growth, f.Span.Round(time.Second), f.Low, f.High, f.Allowed, f.Median)
}

// enough is how many samples a fit needs: with fewer the interval ends at the extreme slopes.
const enough = 12

// z is the quantile of the normal distribution for an interval of 99 %.
const z = 2.576

// Of fits a line, and says whether it grows by more than the limit. Samples of the warm-up are left
// out by the caller.
func Of(samples []Sample, limit Limit) Fit {
	f := Fit{Verdict: TooNoisy, N: len(samples)}
	if f.N < enough {
		return f
	}
	f.Span = samples[f.N-1].At - samples[0].At
	values := make([]float64, f.N)
	for i, s := range samples {
		values[i] = s.Value
	}
	f.Median = median(slices.Clone(values))
	f.Allowed = max(limit.Share*math.Abs(f.Median), limit.Least)

	var slopes []float64
	for i, a := range samples {
		for _, b := range samples[i+1:] {
			if b.At > a.At {
				slopes = append(slopes, (b.Value-a.Value)/(b.At-a.At).Hours())
			}
		}
	}
	if len(slopes) == 0 {
		return f
	}
	slices.Sort(slopes)
	hours := f.Span.Hours()
	slope := middle(slopes)
	f.Growth = slope * hours

	residuals := make([]float64, f.N)
	for i, s := range samples {
		residuals[i] = s.Value - slope*s.At.Hours()
	}
	level := median(slices.Clone(residuals))
	distances := make([]float64, f.N)
	for i := range residuals {
		residuals[i] -= level
		distances[i] = math.Abs(residuals[i])
	}
	f.Noise = median(distances)
	f.Memory = memory(residuals)

	n := float64(f.N)
	variance := n * (n - 1) * (2*n + 5) / 18 * (1 + f.Memory) / (1 - f.Memory)
	reach := z * math.Sqrt(variance)
	at := func(rank float64) float64 {
		return slopes[min(max(int(math.Round(rank)), 0), len(slopes)-1)]
	}
	pairs := float64(len(slopes))
	f.Low, f.High = at((pairs-reach)/2)*hours, at((pairs+reach)/2)*hours
	f.Verdict = f.judge()
	return f
}

// judge is the criterion. Growth fails where it is sure (0 is not in the interval) and matters (it
// is more than is allowed). And who cannot see a growth of twice what is allowed must not say that
// there is none.
func (f Fit) judge() Verdict {
	switch {
	case f.Low > 0 && f.Growth > f.Allowed:
		return Grows
	case f.High > 2*f.Allowed:
		return TooNoisy
	default:
		return Flat
	}
}

// memory is the correlation of neighbours' ranks, at least 0. Where most are the same there is
// nothing to remember.
func memory(residuals []float64) float64 {
	rank := ranks(residuals)
	mean := (float64(len(rank)) - 1) / 2
	var with, of float64
	for i, r := range rank {
		of += (r - mean) * (r - mean)
		if i > 0 {
			with += (r - mean) * (rank[i-1] - mean)
		}
	}
	if of == 0 {
		return 0
	}
	// Beyond it there would be no more than a handful of samples left to judge by.
	return min(max(with/of, 0), .95)
}

// ranks gives each value its place, and equal ones the mean of theirs.
func ranks(values []float64) []float64 {
	order := make([]int, len(values))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(values[a], values[b]) })
	rank := make([]float64, len(values))
	for from := 0; from < len(order); {
		to := from + 1
		for to < len(order) && values[order[to]] == values[order[from]] {
			to++
		}
		for _, i := range order[from:to] {
			rank[i] = float64(from+to-1) / 2
		}
		from = to
	}
	return rank
}

// median sorts its argument.
func median(values []float64) float64 {
	slices.Sort(values)
	return middle(values)
}

func middle(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
