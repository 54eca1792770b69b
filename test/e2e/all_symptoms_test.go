//go:build lab

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// injection is one symptom, made with the real parts.
type injection struct {
	row int // of docs/symptoms.md; 0: none
	id  symptom.ID
	how string // what is done, for the table
	// inject makes it. What is returned takes it away.
	inject func(t *testing.T, p *patient) (end func())
	told   channel
	says   string // a pattern of the line: the cause and the next step
	// beside are findings that the same cause brings, which doctor may tell, too.
	beside []symptom.ID
	// disturbs: the rules or what goes through them do not stay as they are.
	disturbs bool
	// anew: the agent starts anew to end it, and is sure only minutes later that it is over.
	anew bool
	// late is how long until it must be named; 0: a minute.
	late time.Duration
	// check looks at more while it stands.
	check func(t *testing.T, p *patient)
	// ask is the command that answers, with the exit code.
	ask  string
	code int
	// passes: it may be over before it is read.
	passes bool
}

// channel is where a symptom is read.
type channel int

const (
	byAPI       channel = iota // agent-last-failure, by the Compute API
	inStatus                   // status and the metric: advice is told nowhere else
	serialLog                  // the serial port and the log
	answers                    // an answer of a command alone
	doctorAlone                // doctor, where no daemon can tell
)

func (c channel) String() string {
	return [...]string{"agent-last-failure", "status, metric", "serial, log", "command", "doctor"}[c]
}

// situation is a VM in which injections stand one after the other.
type situation struct {
	name       string
	admit      func(t *testing.T) *patient
	injections []injection
}

// patient is a VM, healthy while nothing is injected.
type patient struct {
	*mesh.Mesh
	a      *mesh.Agent
	extras int // services that came, see speak
	// unresolved: the resolvers of vmByName do not know the control plane's name.
	unresolved atomic.Bool
	sick       *atomic.Pointer[sickness] // of vmBehindFake's admin interface
}

// seen is a row of the table of what was measured.
type seen struct {
	injection
	took  time.Duration
	words string
	ok    bool
}

// TestSymptoms makes each symptom with the real parts: it is named within a minute with its cause
// and its next step, where those who cannot log in read it; doctor finds it and nothing else, with
// the same exit code in each form; and it is over by itself when what was done is undone.
func TestSymptoms(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var rows []seen
	note := func(s seen) {
		mu.Lock()
		defer mu.Unlock()
		rows = append(rows, s)
	}
	// They mostly wait: for Envoy's back-off, and for the budget of guest attributes. So they take one
	// of the places of parallel tests together. Only starting one takes the processors.
	starting := make(chan struct{}, 3)
	var wg sync.WaitGroup
	for _, s := range situations {
		wg.Go(func() { t.Run(s.name, func(t *testing.T) { s.play(t, starting, note) }) })
	}
	wg.Wait()
	table := tabulate(rows)
	t.Logf("symptoms:\n%s", table)
	if *record || os.Getenv("SOAK") != "" {
		must(t, writeMeasured(rows))
	}
}

// play makes the VM and has each symptom in it.
func (s situation) play(t *testing.T, starting chan struct{}, note func(seen)) {
	starting <- struct{}{}
	p := func() *patient {
		defer func() { <-starting }()
		return s.admit(t)
	}()
	for _, i := range s.injections {
		t.Run(fmt.Sprintf("row %d %s", i.row, i.how), func(t *testing.T) {
			result := seen{injection: i}
			defer func() {
				result.ok = !t.Failed()
				note(result)
			}()
			result.took, result.words = p.suffer(t, i)
		})
	}
}

// suffer has the symptom injected, named, found by doctor, and over.
func (p *patient) suffer(t *testing.T, i injection) (took time.Duration, words string) {
	before, stale := chains(t, p.Mesh), p.lastFailure()
	end := sync.OnceFunc(i.inject(t, p))
	began := time.Now()
	t.Cleanup(end) // the next one begins with a healthy VM
	words = p.named(t, i, stale)
	took = time.Since(began)
	t.Logf("named after %.1f s: %s", took.Seconds(), words)
	if took > i.limit() {
		t.Errorf("named after %v, want at most %v", took, i.limit())
	}
	if i.told != answers && i.told != doctorAlone {
		p.counted(t, i.id)
	}
	if said := p.examine(t, i); i.told == doctorAlone {
		words = said
	}
	if i.told != answers && (*record || os.Getenv("SOAK") != "") {
		p.replays(t, i)
	}
	// The lab's log has a name of its own, which is nobody else's business.
	words = strings.ReplaceAll(words, p.Envoy.LogPath, "/var/log/envoy/envoy.err.log")
	if i.check != nil {
		i.check(t, p)
	}
	if !i.disturbs {
		if now := chains(t, p.Mesh); now != before {
			t.Errorf("the rules changed:\n%s\nbefore:\n%s", now, before)
		}
		through(t, p.Mesh, web4)
	}
	end()
	p.recovers(t, i)
	return took, words
}

// limit is a minute, beside other tests half a minute more: a second failure within a minute waits
// for the budget of guest attributes, and has seconds left.
func (i injection) limit() time.Duration {
	switch {
	case i.late != 0:
		return i.late
	case os.Getenv("SOAK") == "":
		return 90 * time.Second
	}
	return time.Minute
}

// named waits until the symptom is told where people read it, and returns the words. stale is what
// the attribute told before, which may be of the same symptom.
func (p *patient) named(t *testing.T, i injection, stale string) (words string) {
	t.Helper()
	line := regexp.MustCompile(i.says)
	ctx := within(t, i.limit()+30*time.Second) // to say by how much it was late
	switch i.told {
	case byAPI:
		if err := p.Platform.Wait(ctx, func() bool {
			words = p.lastFailure()
			return words != stale && line.MatchString(words) && (i.passes || lasts(words))
		}); err != nil {
			s, _ := p.a.Status(t.Context())
			t.Fatalf("%v: agent-last-failure is %q; last failure %q, findings %+v", err, words,
				s.LastFailure, s.Findings)
		}
	case inStatus:
		_, err := p.a.Wait(ctx, string(i.id), func(s status.Status) bool {
			at := slices.IndexFunc(s.Findings, func(f symptom.Finding) bool {
				return f.ID == i.id && line.MatchString(f.Text())
			})
			if at >= 0 {
				words = s.Findings[at].Text()
			}
			return at >= 0
		})
		must(t, err)
	case serialLog:
		must(t, p.Platform.Wait(ctx, func() bool {
			words = line.FindString(p.Platform.Serial())
			return words != ""
		}))
		eventually(t, 5*time.Second, "the words in the log", func() (bool, string) {
			return line.MatchString(p.a.Log()), p.a.Log()
		})
	case answers:
		words = p.answered(t, i)
	case doctorAlone: // examine asks
	}
	return words
}

// answered asks until the words are in the answer. The exit code is the same in each form.
func (p *patient) answered(t *testing.T, i injection) (words string) {
	t.Helper()
	line := regexp.MustCompile(i.says)
	args := strings.Fields(i.ask)
	eventually(t, 10*time.Second, "an answer to "+i.ask, func() (bool, string) {
		out, stderr, code, err := p.a.RunAs(t.Context(), 0, p.a.Settings(), args...)
		must(t, err)
		words = line.FindString(unwrapped(out))
		return words != "" && code == i.code, fmt.Sprintf("exit code %d\n%s%s", code, out, stderr)
	})
	_, _, code, err := p.a.RunAs(t.Context(), 0, p.a.Settings(), append(args, "-o", "json")...)
	must(t, err)
	if code != i.code {
		t.Errorf("%s -o json: exit code %d, want %d", i.ask, code, i.code)
	}
	return words
}

// lasts says of the words of agent-last-failure whether what they begin with is still there. Behind
// it may stand what was before.
func lasts(words string) bool {
	over, since := strings.Index(words, "(over; "), strings.Index(words, "since ")
	return over < 0 || 0 <= since && since < over
}

// lastFailure asks the Compute API for agent-last-failure, as gcloud does.
func (p *patient) lastFailure() string {
	w := httptest.NewRecorder()
	p.Platform.ServeHTTP(w, httptest.NewRequest(http.MethodGet,
		vmPath+"/getGuestAttributes?alt=json&queryPath="+
			url.QueryEscape(guestattr.Namespace+"/"+guestattr.AgentLastFailure), nil))
	var answer struct {
		QueryValue struct{ Items []struct{ Value string } }
	}
	if json.Unmarshal(w.Body.Bytes(), &answer) != nil || len(answer.QueryValue.Items) != 1 {
		return "" // not written yet
	}
	return answer.QueryValue.Items[0].Value
}

// counted checks the metric's series.
func (p *patient) counted(t *testing.T, id symptom.ID) {
	t.Helper()
	series := regexp.MustCompile(fmt.Sprintf(
		`(?m)^service_proxy_agent_finding\{id="%s",severity="[a-z]+"\} [1-9]`, id))
	eventually(t, 5*time.Second, "the metric of "+string(id), func() (bool, string) {
		_, body, err := p.a.Get("/metrics")
		if err != nil { // another program may have the address
			return hasStatus(t, p.a, id), err.Error()
		}
		return series.MatchString(body), body
	})
}

func hasStatus(t *testing.T, a *mesh.Agent, id symptom.ID) bool {
	s, err := a.Status(t.Context())
	return err == nil && hasFinding(s, id)
}

// recovers waits until nothing is wrong with the VM. What stood is then told as over.
func (p *patient) recovers(t *testing.T, i injection) {
	t.Helper()
	if i.told == answers {
		return
	}
	// Envoy's own back-off is up to 30 s.
	_, err := p.a.Wait(within(t, 90*time.Second), "recovery", func(s status.Status) bool {
		return s.Ready && !slices.ContainsFunc(s.Findings, func(f symptom.Finding) bool {
			return f.ID == i.id || f.Severity != symptom.Advice
		}) && (i.told != byAPI || i.anew || strings.Contains(s.LastFailure, "(over; "))
	})
	must(t, err)
	if p.extras == 0 {
		return
	}
	// The stream stands before what it brings is in the rules.
	newest := "-d " + service(p.extras).Prefixes[0].String() + " "
	eventually(t, 20*time.Second, "the newest service in the rules", func() (bool, string) {
		out := chains(t, p.Mesh)
		return strings.Contains(out, newest), out
	})
}

// speak has the control plane answer again, with a new service so that it has something to say.
func (p *patient) speak(t *testing.T) {
	t.Helper()
	p.extras++
	p.CP.Serve()
	_, err := p.CP.Set(p.config())
	must(t, err)
}

// config is what the control plane sends while nothing is wrong.
func (p *patient) config() (c controlplane.Config) {
	if p.extras == 0 {
		return services()
	}
	return services(service(p.extras))
}
