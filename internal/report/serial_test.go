package report

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files")

// TestSerialFormat holds the line format, version 1, against testdata/serial.golden.
func TestSerialFormat(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 1, 234_560_000, time.FixedZone("CET", 3600))
	got := formatLine(at, Info, "Envoy 1.40.0 is live") +
		formatLine(at, Error,
			"Cannot reach the Traffic Director API server: look up\ntrafficdirector.googleapis.com: no such host") +
		formatLine(at, Warning, "guest attributes are disabled: set enable-guest-attributes=TRUE") +
		formatLine(at, "", "no severity\x1b[2J") +
		formatLine(at, Error, strings.Repeat("ü", 600))
	checkGolden(t, "serial.golden", got)
}

func checkGolden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("differs from %s (-update writes it):\n%s", path, got)
	}
}

// openPTY returns the master of a new pseudo terminal and the path of its slave, which
// stands for /dev/ttyS0.
func openPTY(t *testing.T) (master *os.File, slave string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	// Not Fd(), which would make it blocking and its reads deaf to deadlines.
	rc, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	rc.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return master, fmt.Sprintf("/dev/pts/%d", n)
}

// run starts s and returns what stops it; it fails the test when Run does not
// end within two seconds.
func run(t *testing.T, s *Serial) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop = func() {
		t.Helper()
		cancel()
		select {
		case err, ok := <-ended:
			if ok && err != nil {
				t.Errorf("Run: %v", err)
			}
			if ok {
				close(ended)
			}
		case <-time.After(2 * time.Second):
			t.Error("Run did not end within 2 s")
		}
	}
	t.Cleanup(stop)
	return stop
}

func readLine(t *testing.T, f *os.File, r *bufio.Reader) string {
	t.Helper()
	f.SetReadDeadline(time.Now().Add(10 * time.Second))
	l, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("read %q: %v", l, err)
	}
	return strings.TrimRight(l, "\r\n")
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestSerialPTY(t *testing.T) {
	master, slave := openPTY(t)
	s := NewSerial(slave)
	s.Say(Info, "said before Run")
	stop := run(t, s)
	r := bufio.NewReader(master)
	want := regexp.MustCompile(
		`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{4}Z service-proxy-agent/1 INFO: said before Run$`)
	if l := readLine(t, master, r); !want.MatchString(l) {
		t.Errorf("read %q", l)
	}
	s.Say(Error, "and after")
	if l := readLine(t, master, r); !strings.HasSuffix(l, " ERROR: and after") {
		t.Errorf("read %q", l)
	}
	eventually(t, "two lines counted", func() bool { return s.State().Lines == 2 })
	if st := s.State(); !st.Open || st.LastError != "" || st.Dropped != 0 {
		t.Errorf("%+v", st)
	}
	stop()
}

// TestSerialBlocked has nobody read the port: Say goes on at once, the oldest lines are dropped and
// counted, the newest get through whole once somebody reads.
func TestSerialBlocked(t *testing.T) {
	master, slave := openPTY(t)
	s := NewSerial(slave)
	run(t, s)
	const lines = 1000
	start := time.Now()
	for i := range lines {
		s.Say(Info, fmt.Sprintf("line %d %s", i, strings.Repeat("x", 500)))
	}
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("%d lines took %v to say on a blocked port", lines, d)
	}
	eventually(t, "drops", func() bool { return s.State().Dropped > 0 })

	r := bufio.NewReader(master)
	whole := regexp.MustCompile(
		`^\S+Z service-proxy-agent/1 (INFO: line (\d+) x{500}|WARNING: (\d+) lines dropped: the serial port did not take them)$`)
	last, got, dropped := -1, 0, 0
	for last != lines-1 {
		l := readLine(t, master, r)
		m := whole.FindStringSubmatch(l)
		if m == nil {
			t.Fatalf("read %q; want whole lines only", l)
		}
		var n int
		if m[3] != "" {
			fmt.Sscan(m[3], &n)
			dropped += n
			continue
		}
		fmt.Sscan(m[2], &n)
		if n <= last {
			t.Fatalf("line %d after line %d", n, last)
		}
		last = n
		got++
	}
	if got+dropped != lines {
		t.Errorf("%d lines read and %d said to be dropped; want %d together", got, dropped, lines)
	}
	if st := s.State(); st.Dropped != uint64(dropped) {
		t.Errorf("State says %d dropped; the port was told %d", st.Dropped, dropped)
	}
}

// TestSerialStopBlocked: a port that takes nothing does not hold up the end (run fails
// the test if it does).
func TestSerialStopBlocked(t *testing.T) {
	_, slave := openPTY(t)
	s := NewSerial(slave)
	stop := run(t, s)
	for range 200 {
		s.Say(Info, strings.Repeat("x", 1000))
	}
	eventually(t, "drops", func() bool { return s.State().Dropped > 0 })
	stop()
}

// TestSerialDeviceComesAndGoes: missing at the start, there, hung up, there again.
func TestSerialDeviceComesAndGoes(t *testing.T) {
	dev := filepath.Join(t.TempDir(), "ttyS0")
	s := NewSerial(dev)
	run(t, s)
	s.Say(Info, "one")
	eventually(t, "an error", func() bool { return s.State().LastError != "" })
	if st := s.State(); st.Open || !strings.Contains(st.LastError, "open serial port") {
		t.Errorf("%+v", st)
	}
	if _, err := os.Lstat(dev); err == nil {
		t.Error("the missing device was created as a file")
	}

	master, slave := openPTY(t)
	if err := os.Symlink(slave, dev); err != nil {
		t.Fatal(err)
	}
	if l := readLine(t, master, bufio.NewReader(master)); !strings.HasSuffix(l, "INFO: one") {
		t.Errorf("read %q", l)
	}
	os.Remove(dev)
	master.Close() // hang-up: writes fail with EIO
	s.Say(Info, "two")
	eventually(t, "closed", func() bool { return !s.State().Open })
	master, slave = openPTY(t)
	if err := os.Symlink(slave, dev); err != nil {
		t.Fatal(err)
	}
	if l := readLine(t, master, bufio.NewReader(master)); !strings.HasSuffix(l, "INFO: two") {
		t.Errorf("read %q", l)
	}
}

func TestSerialOff(t *testing.T) {
	s := NewSerial("")
	stop := run(t, s)
	for range 2 * maxQueue {
		s.Say(Error, "nobody")
	}
	if st := s.State(); st.Dropped != 0 || st.Open {
		t.Errorf("%+v", st)
	}
	stop()
}
