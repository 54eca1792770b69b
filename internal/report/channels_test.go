package report_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/cloudlog"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// trouble is what a channel meets for ten minutes.
type trouble struct {
	name    string
	http    platform.Fault // of guest attributes and Cloud Logging
	refuses bool           // their connections
	port    portState
	// By when guest attributes and Cloud Logging try again: the longest back-off and the longest
	// query under way, what a refusal waits for, or when a value is read back. The serial port takes
	// 30 s at most.
	guest, cloud time.Duration
}

// inShort is how many of them there is time for but in make soak.
const inShort = 5

var troubles = []trouble{
	{"hang", platform.Fault{Hang: true}, false, portHangs, 35 * time.Second, 70 * time.Second},
	{"refuse connections", platform.Fault{}, true, portBroken, 30 * time.Second, 60 * time.Second},
	{"are switched off", platform.Fault{Status: http.StatusForbidden}, false, portGone,
		2 * time.Minute, 10 * time.Minute},
	{"are slow", platform.Fault{Delay: 4 * time.Second}, false, portSlow, 5 * time.Second,
		10 * time.Second},
	// A page to sign in. (To the serial port nobody answers anything.) Guest attributes take it for
	// an answer: the value that it cost is found missing when it is read back.
	{"answer nonsense", platform.Fault{Status: http.StatusOK, Body: "<html>"}, false, portWorks,
		10 * time.Minute, time.Minute},
	{"are busy", platform.Fault{Status: http.StatusServiceUnavailable,
		Header: map[string]string{"Retry-After": "45"}}, false, portSlow, 30 * time.Second,
		time.Minute},
	{"redirect", platform.Fault{Status: http.StatusFound,
		Header: map[string]string{"Location": "http://elsewhere/"}}, false, portWorks,
		30 * time.Second, time.Minute},
}

// TestChannels: for ten minutes of emulated time a channel, or all together, meet trouble, while an
// event is told and other values are set each second. No rate is exceeded, the others go on as if
// nothing was, and after the trouble everything is as if there had been none, but for what was
// dropped, of which exactly that is said. (In make soak each befalls each one alone, too.)
//
// What one channel does alone, in more kinds of trouble, is tested where it is: TestSerialBlocked
// and TestSerialDeviceComesAndGoes here, on a real pty, TestFailures and TestChurn in guestattr,
// TestTrouble, TestFull and TestRates, with its bound of memory, in internal/cloudlog.
func TestChannels(t *testing.T) {
	t.Setenv(cloudlog.EndpointEnv, "http://logging")
	soak := os.Getenv("SOAK") != ""
	for i, tr := range troubles {
		for _, which := range [][]string{{"guest"}, {"serial"}, {"cloud"}, {"guest", "serial", "cloud"}} {
			if !soak && (len(which) == 1 && i > 0 || i >= inShort) ||
				slices.Equal(which, []string{"serial"}) && tr.port == portWorks {
				continue
			}
			t.Run(strings.Join(which, "+")+" "+tr.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { meet(t, tr, which) })
			})
		}
	}
}

func meet(t *testing.T, tr trouble, which []string) {
	w := newWorld(t)
	w.live(t, time.Minute)
	for name, s := range w.states() {
		if s.dropped+s.failures != 0 || !s.up {
			t.Errorf("healthy: %s: %+v", name, s)
		}
	}
	mend := w.meet(tr, which)
	w.guest.Set(guestattr.ProxyVersion, "during")
	w.live(t, 10*time.Minute)
	for name, s := range w.states() {
		if !slices.Contains(which, name) && (s.dropped+s.failures != 0 || !s.up) {
			t.Errorf("%s is well, and does %+v", name, s)
		}
	}
	mend()

	// Each has recovered by its time.
	w.live(t, max(tr.guest, tr.cloud, 30*time.Second)+time.Second)
	for name, s := range w.states() {
		if !s.up {
			t.Errorf("after its time %s is still down: %+v", name, s)
		}
	}
	time.Sleep(3 * time.Minute) // nothing more is told: what waited for the rate is written
	synctest.Wait()
	if got, want := w.vm.GuestAttributes(guestattr.Namespace), w.set; got["proxy-version"] !=
		"during" || got["agent-last-failure"] != want {
		t.Errorf("guest attributes %v, want the failure %q", got, want)
	}
	states := w.states()
	w.complete(t, "serial", w.port.lines(), states["serial"])
	w.complete(t, "cloud", w.entries(), states["cloud"])
	w.rates(t)
}

// world is the three channels, as the agent has them, before an emulated platform.
type world struct {
	vm      *platform.Emulator
	port    *port
	serial  *report.Serial
	guest   *guestattr.Writer
	cloud   *cloudlog.Writer
	refused map[string]bool // hosts
	events  int             // told so far
	set     string          // the newest failure
}

func newWorld(t *testing.T) *world {
	w := &world{vm: platform.New(platform.VM{}), port: &port{changed: make(chan struct{})},
		refused: map[string]bool{}}
	pipe := w.vm.Pipe()
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		if host, _, _ := net.SplitHostPort(address); w.refused[host] {
			return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
		}
		return pipe(ctx, network, address)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	w.serial = report.NewSerialOn(w.port.open)
	w.guest = guestattr.New(guestattr.Options{Host: "guest", Dial: dial})
	w.cloud = cloudlog.New(cloudlog.Options{Mode: cloudlog.On,
		Transport: &http.Transport{DialContext: dial},
		Read: func(ctx context.Context, path string) ([]byte, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet,
				"http://metadata/computeMetadata/v1/"+path, nil)
			if err != nil {
				return nil, err
			}
			req.Header.Set("Metadata-Flavor", "Google")
			resp, err := client.Do(req)
			if err != nil {
				return nil, err
			}
			defer resp.Body.Close()
			return io.ReadAll(resp.Body)
		}})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{w.serial.Run, w.guest.Run, w.cloud.Run} {
		wg.Go(func() { run(ctx) })
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := w.vm.Close(); err != nil { // the budget of guest attributes was exceeded
			t.Error(err)
		}
	})
	return w
}

// live tells and sets for so long.
func (w *world) live(t *testing.T, d time.Duration) {
	t.Helper()
	for range int(d / time.Second) {
		w.events++
		message := fmt.Sprintf("event %d %s", w.events, strings.Repeat("x", 700))
		w.serial.Say(report.Info, message)
		w.cloud.Say(report.Event{Severity: report.Info, Message: message})
		w.set = fmt.Sprintf("failure %d", w.events)
		w.guest.Set(guestattr.AgentLastFailure, w.set)
		w.guest.Set(guestattr.AgentHeartbeat, time.Now().Format(time.RFC3339))
		time.Sleep(time.Second)
		synctest.Wait()
	}
}

// meet begins the trouble for some channels.
func (w *world) meet(tr trouble, which []string) (mend func()) {
	var ends []func()
	for _, name := range which {
		fault := tr.http
		switch name {
		case "serial":
			w.port.set(tr.port)
			ends = append(ends, func() { w.port.set(portWorks) })
			continue
		case "guest":
			fault.Prefix = "/computeMetadata/v1/instance/guest-attributes/"
		case "cloud":
			fault.Prefix = "/v2/entries:write"
			name = "logging"
		}
		if tr.refuses {
			w.refused[name] = true
			ends = append(ends, func() { delete(w.refused, name) })
			continue
		}
		ends = append(ends, w.vm.Inject(fault))
	}
	return func() {
		for _, end := range ends {
			end()
		}
	}
}

// state is what the channels have in common.
type state struct {
	up                bool
	failures, dropped uint64
}

func (w *world) states() map[string]state {
	synctest.Wait()
	g, s, c := w.guest.State(), w.serial.State(), w.cloud.State()
	return map[string]state{
		"guest":  {g.Enabled && g.LastError == "", g.Failures, 0},
		"serial": {s.Open && !s.Blocked, s.Failures, s.Dropped},
		"cloud":  {c.Enabled && c.Up, c.Failures, c.Dropped},
	}
}

// entries are the messages in Cloud Logging.
func (w *world) entries() (messages []string) {
	for _, e := range w.vm.LogEntries() {
		messages = append(messages, fmt.Sprint(e.JSONPayload["message"]))
	}
	return messages
}

// complete fails unless each event arrived, in order, or is said to be dropped.
func (w *world) complete(t *testing.T, name string, messages []string, s state) {
	t.Helper()
	last, arrived, said := 0, 0, uint64(0)
	for _, m := range messages {
		var n uint64
		var event int
		switch {
		case strings.Contains(m, " dropped: "):
			fmt.Sscan(m, &n)
			said += n
		default:
			if _, err := fmt.Sscanf(m, "event %d", &event); err != nil || event <= last {
				t.Errorf("%s: %.20q after event %d", name, m, last)
				return
			}
			last = event
			arrived++
		}
	}
	if said != s.dropped || arrived+int(said) != w.events || last != w.events {
		t.Errorf("%s: %d events arrived and %d are said to be dropped of %d, the last %d: %+v",
			name, arrived, said, w.events, last, s)
	}
}

// rates fails where Cloud Logging was asked more often than once a second, or took more than 300
// entries within a minute.
func (w *world) rates(t *testing.T) {
	t.Helper()
	var last time.Time
	for _, r := range w.vm.Requests() {
		if r.Path == "/v2/entries:write" {
			if r.At.Sub(last) < time.Second {
				t.Errorf("asked Cloud Logging at %v and %v", last, r.At)
			}
			last = r.At
		}
	}
	entries := w.vm.LogEntries()
	for i, j := 0, 0; i < len(entries); i++ {
		for entries[i].ReceiveTimestamp.Sub(entries[j].ReceiveTimestamp) >= time.Minute {
			j++
		}
		if i-j >= 300 {
			t.Errorf("%d entries in the minute before %v", i-j+1, entries[i].ReceiveTimestamp)
			return
		}
	}
}

// port is a serial port in memory.
type port struct {
	mu       sync.Mutex
	state    portState
	deadline time.Time
	changed  chan struct{} // closed and replaced when state or deadline is another one
	text     strings.Builder
}

type portState int

const (
	portWorks portState = iota
	portHangs
	portBroken // EIO
	portGone   // EIO for who has it open, ENXIO for others, as of a UART that is not there
	portSlow   // a line each two seconds
)

func (p *port) set(s portState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = s
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *port) open() (report.Device, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == portGone {
		return nil, &os.PathError{Op: "open", Path: "/dev/ttyS0", Err: syscall.ENXIO}
	}
	p.deadline = time.Time{}
	return p, nil
}

func (p *port) Write(line []byte) (int, error) {
	for slept := false; ; {
		p.mu.Lock()
		changed, state, deadline := p.changed, p.state, p.deadline
		if state == portWorks || state == portSlow && slept {
			p.text.Write(line)
			p.mu.Unlock()
			return len(line), nil
		}
		p.mu.Unlock()
		var over <-chan time.Time
		if !deadline.IsZero() {
			over = time.After(time.Until(deadline))
		}
		switch state {
		case portBroken, portGone:
			return 0, syscall.EIO
		case portSlow:
			time.Sleep(2 * time.Second)
			slept = true
		case portHangs:
			select {
			case <-changed:
			case <-over:
				return 0, os.ErrDeadlineExceeded
			}
		}
	}
}

func (p *port) SetWriteDeadline(at time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = at
	close(p.changed)
	p.changed = make(chan struct{})
	return nil
}

func (p *port) Close() error { return nil }

// lines are what was written, without time and severity.
func (p *port) lines() (messages []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for line := range strings.Lines(p.text.String()) {
		_, message, _ := strings.Cut(line, ": ")
		messages = append(messages, message)
	}
	return messages
}
