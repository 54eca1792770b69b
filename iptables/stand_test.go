package iptables

import (
	"cmp"
	"errors"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/xtables"
)

// aTable answers as the kernel would of a table.
type aTable struct {
	print  xtables.Print
	err    error
	noHash error // of prints alone
	prints int   // that were asked for
}

func (a *aTable) Info(string) (xtables.Info, error) { return a.print.Info, a.err }
func (a *aTable) Close() error                      { return nil }

func (a *aTable) Print(string) (xtables.Print, error) {
	a.prints++
	return a.print, cmp.Or(a.err, a.noHash)
}

// TestLook: each state that was not read is told of once, whatever came before.
func TestLook(t *testing.T) {
	kernel := &aTable{print: xtables.Print{Info: xtables.Info{Number: 7}, Sum: 1}}
	s := &stand{there: true}
	end := s.watched(func() (asked, error) { return kernel, nil })
	l := &look{stand: s}
	now := time.Now()
	read := func() {
		t.Helper()
		if _, err := s.read(func() (Table, error) { return Table{}, nil }); err != nil {
			t.Fatal(err)
		}
	}
	asLarge := func() { kernel.print.Sum++ }
	larger := func() { kernel.print.Number++ }
	smaller := func() { kernel.print.Number-- }
	hint := func() { l.pace.hinted = true }
	busy := func() { s.busy++ }
	idle := func() { s.busy-- }
	fail := func() { kernel.err = xtables.ErrRefused }
	answer := func() { kernel.err = nil }
	later := func() { now = now.Add(2 * printEvery) }
	for n, step := range []struct {
		name string
		do   []func()
		told bool
	}{
		{"nothing was read yet", nil, true},
		{"that was told", nil, false},
		{"it was read", []func(){read}, false},
		{"a rule more", []func(){larger}, true},
		{"that was told", nil, false},
		{"somebody took it away again", []func(){smaller}, false},
		{"and added it again", []func(){larger}, true},
		{"taken away, read, and added again", []func(){smaller, read, larger}, true},
		{"read, and as it was", []func(){read}, false},
		{"changed, read, and changed back", []func(){larger, read, smaller}, true},
		{"read", []func(){read, later}, false},
		{"as large", []func(){asLarge}, false},
		{"as large, when the hash is due", []func(){later}, true},
		{"read", []func(){read}, false},
		{"as large, with a hint", []func(){asLarge, hint}, true},
		{"read", []func(){read}, false},
		{"we write", []func(){busy, larger, hint}, false},
		{"and read it back", []func(){read, idle}, false},
		{"somebody writes while we do", []func(){busy, larger, read, asLarge, hint, idle}, true},
		{"read", []func(){read}, false},
		{"the kernel does not answer", []func(){fail, larger}, false},
		{"it answers again: who knows what was missed", []func(){answer}, true},
		{"read", []func(){read}, false},
	} {
		for _, do := range step.do {
			do()
		}
		if told := l.changed(now); told != step.told {
			t.Errorf("step %d, %s: told %v", n, step.name, told)
		}
		if now = now.Add(infoEvery); errors.Is(s.why, xtables.ErrRefused) != (kernel.err != nil) {
			t.Errorf("step %d, %s: why it does not answer: %v", n, step.name, s.why)
		}
	}
	end()
	if l.changed(now) {
		t.Error("told after the end")
	}
}

// TestNobodyAsksBeforeTheTableIsThere: to ask makes it.
func TestNobodyAsksBeforeTheTableIsThere(t *testing.T) {
	kernel := &aTable{}
	s := &stand{}
	defer s.watched(func() (asked, error) { return kernel, nil })()
	l := &look{stand: s}
	if _, err := s.read(func() (Table, error) { return Table{}, ErrLocked }); err == nil {
		t.Fatal("no error")
	}
	if l.changed(time.Now()) || kernel.prints > 0 || s.there {
		t.Errorf("%d prints of a table that nobody has read", kernel.prints)
	}
	if _, err := s.read(func() (Table, error) { return Table{}, nil }); err != nil || !s.there {
		t.Fatal(err)
	}
	if kernel.prints > 0 || !l.changed(time.Now()) {
		t.Errorf("what was read first is not known to be what is there")
	}
}

// TestPace: hashes take a 600th of a processor at most, and under any number of hints a tenth.
func TestPace(t *testing.T) {
	for _, test := range []struct {
		took, every, hinted time.Duration
	}{
		{100 * time.Microsecond, printEvery, 100 * time.Millisecond}, // a look is each 0.1 s
		{5 * time.Millisecond, printEvery, 100 * time.Millisecond},
		{17 * time.Millisecond, 10200 * time.Millisecond, 200 * time.Millisecond},
	} {
		count := func(hinted bool) (n int) {
			var p pace
			now := time.Unix(1e9, 0)
			for end := now.Add(time.Hour); now.Before(end); now = now.Add(infoEvery) {
				p.hinted = hinted
				if p.wants(now) {
					n++
					p.asked(now, test.took)
				}
			}
			return n
		}
		if n, most := count(false), int(time.Hour/test.every)+1; n > most || n < most*9/10 {
			t.Errorf("%v: %d hashes an hour, want %d", test.took, n, most)
		}
		if n, most := count(true), int(time.Hour/test.hinted)+1; n > most || n < most*9/10 {
			t.Errorf("%v: %d hashes an hour under hints, want %d", test.took, n, most)
		}
	}
}

// TestNoHash: a kernel that says how large a table is, but never gives its rules, is as one that
// says nothing: the caller polls. It is told of once, not at each look, and no event has it read
// ten times a second.
func TestNoHash(t *testing.T) {
	kernel := &aTable{noHash: xtables.ErrABI}
	s := &stand{there: true}
	defer s.watched(func() (asked, error) { return kernel, nil })()
	l := &look{stand: s}
	events, whys, was := 0, 0, error(nil)
	now := time.Now()
	for range 100 {
		if l.changed(now) {
			events++
			if _, err := s.read(func() (Table, error) { return Table{}, nil }); err != nil {
				t.Fatal(err)
			}
		}
		if s.why != nil && was == nil {
			whys++
		}
		was = s.why
		now = now.Add(infoEvery)
	}
	if events > 2 || whys > 2 || !errors.Is(s.why, xtables.ErrABI) {
		t.Errorf("%d events, told %d times that it does not answer, at last %v", events, whys, s.why)
	}
	kernel.noHash = nil
	if _, err := s.read(func() (Table, error) { return Table{}, nil }); err != nil {
		t.Fatal(err)
	}
	if l.changed(now) || s.why != nil {
		t.Errorf("it answers again: %v", s.why)
	}
}
