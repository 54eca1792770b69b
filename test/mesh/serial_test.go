package mesh

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// TestSerial: each fault holds what is written up, and after it every line has arrived whole, or is
// said to be dropped.
func TestSerial(t *testing.T) {
	vm := platform.New(platform.VM{})
	s, err := openSerial(filepath.Join(t.TempDir(), "ttyS0"), vm)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	port := report.NewSerial(s.Path)
	go port.Run(t.Context())
	said := 0
	say := func(n int) {
		for range n {
			said++
			port.Say(report.Info, fmt.Sprintf("line %d.", said))
		}
	}
	wait := func(what string, holds func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not within 10 s: %s: %+v\n%s", what, port.State(), vm.Serial())
			}
		}
	}
	last := func() bool { return strings.Contains(vm.Serial(), fmt.Sprintf("line %d.", said)) }
	say(3)
	wait("healthy", last)
	for name, fault := range map[string]func() error{
		"hangs": s.Hang, "is slow": func() error { return s.Slow(20) }, "refuses": s.Refuse,
	} {
		if err := fault(); err != nil {
			t.Fatal(err)
		}
		dropped := port.State().Dropped
		say(300)
		wait("lines dropped while it "+name, func() bool { return port.State().Dropped > dropped })
		if last() {
			t.Errorf("while it %s the last line arrived", name)
		}
		if err := s.Mend(); err != nil {
			t.Fatal(err)
		}
		wait("mended: "+name, last)
	}
	lines, dropped := 0, uint64(0)
	for _, line := range regexp.MustCompile(`(\d+) lines dropped|line \d+\.`).FindAllStringSubmatch(
		vm.Serial(), -1) {
		var n uint64
		if fmt.Sscan(line[1], &n); n == 0 {
			lines++
		}
		dropped += n
	}
	if dropped != port.State().Dropped || lines+int(dropped) != said {
		t.Errorf("%d lines and %d said to be dropped, of %d: %+v", lines, dropped, said, port.State())
	}
}
