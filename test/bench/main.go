// Command bench is what `make bench` does with its figures, once all is measured (test/bench.sh):
// it says which ratios moved since the baseline, and makes docs/scale.md with its pictures.
//
// It judges nothing: what moved is for a person to read, since the next run moves by itself. Only
// ratios against a floor or a peer of the same run are kept and compared. The rest is of one
// machine.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"

	"github.com/service-proxy-agent/service-proxy-agent/test/bench/result"
)

// files are where things are.
type files struct {
	curve, bench, baseline string
	out                    string // folder of a document to look at
	docs                   string // folder of the one that is kept, with the baseline; "": neither
}

func main() {
	var f files
	flag.StringVar(&f.curve, "curve", "build/bench/curve.json", "what test/curve measured")
	flag.StringVar(&f.bench, "bench", "build/bench/bench.txt", "what go test -bench printed")
	flag.StringVar(&f.baseline, "baseline", "test/bench/baseline.json", "the ratios to compare with")
	flag.StringVar(&f.out, "out", "build/bench", "folder for scale.md and img")
	flag.StringVar(&f.docs, "docs", "", "folder for the same to keep; the baseline is written then")
	flag.Parse()
	if err := f.report(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// failed is what go test prints of a package in which something failed.
var failed = regexp.MustCompile(`(?m)^FAIL\b`)

// report says what moved and writes the documents. An error is a file that could not be read or
// written, never a ratio.
func (f files) report(w io.Writer) error {
	printed, err := os.ReadFile(f.bench)
	if err != nil {
		return err
	}
	benchmarks := benchRatios(bytes.NewReader(printed))
	now := maps.Clone(benchmarks)
	run, err := result.Read(f.curve)
	there := err == nil
	switch {
	case errors.Is(err, fs.ErrNotExist):
		fmt.Fprintf(w, "no curve: there is no %s\n", f.curve)
	case err != nil:
		return err
	case run.Brief:
		fmt.Fprintf(w, "no curve: %s is of a brief run, whose figures mean little\n", f.curve)
		there = false
	default:
		maps.Copy(now, curveRatios(run))
	}
	old, err := readBaseline(f.baseline)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		fmt.Fprintf(w, "no baseline: there is no %s\n", f.baseline)
	case err != nil:
		return err
	default:
		old.compare(now, run.Machine).print(w)
	}
	if !there {
		if f.docs != "" {
			return fmt.Errorf("no document without a curve: %s stays as it is", f.docs)
		}
		return nil
	}
	if err := writeDocument(w, f.out, run, benchmarks); err != nil {
		return err
	}
	if f.docs == "" {
		fmt.Fprintln(w, "docs/scale.md and the baseline stay as they are: DOCS=1 writes them of a run")
		return nil
	}
	if failed.Match(printed) {
		return fmt.Errorf("something failed in %s: %s and the baseline stay as they are", f.bench, f.docs)
	}
	if err := writeDocument(w, f.docs, run, benchmarks); err != nil {
		return err
	}
	return writeBaseline(w, f.baseline, baseline{Date: run.Date, Machine: run.Machine,
		Kernel: run.Kernel, Ratios: now})
}

// writeDocument writes scale.md and its pictures into a folder.
func writeDocument(w io.Writer, folder string, run result.Run, printed ratios) error {
	d := newDocument(run, printed)
	images := filepath.Join(folder, "img")
	if err := os.MkdirAll(images, 0o755); err != nil {
		return err
	}
	// Those of an earlier run: one that is not drawn any more would stay for ever.
	stale, err := filepath.Glob(filepath.Join(images, "scale-*.svg"))
	if err != nil {
		return err
	}
	for _, name := range stale {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	for _, p := range d.pictures {
		if err := os.WriteFile(filepath.Join(images, p.file), []byte(p.svg), 0o644); err != nil {
			return err
		}
	}
	name := filepath.Join(folder, "scale.md")
	if err := os.WriteFile(name, []byte(d.text), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(w, "wrote %s and %d pictures in %s\n", name, len(d.pictures), images)
	return nil
}
