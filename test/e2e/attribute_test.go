//go:build lab

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// TestAttribute: a change of the attribute takes effect without a restart. One that is malformed or
// gone changes nothing and is named, as is a metadata server that gives none, and the last good one
// is in force over a restart of the agent: new services come in, and what is removed is repaired.
// On a clone it is not.
func TestAttribute(t *testing.T) {
	t.Parallel()
	const name = "gce-service-proxy"
	m, a := start(t, mesh.Options{Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	changed := time.Now()
	m.Platform.SetAttribute(name,
		`{"api-version":"0.2","proxy-spec":{"network":""},"traffic-interception":{"exclude-outbound-ip-ranges":["10.10.0.2"]}}`)
	escapes(t, m, db4)
	through(t, m, web4)
	s, err := a.Wait(within(t, 5*time.Second), "the attribute in force", func(s status.Status) bool {
		return s.Attribute != nil && !s.Attribute.Kept && s.Attribute.Read.After(changed)
	})
	must(t, err)
	read := s.Attribute.Read

	malform := func() {
		m.Platform.SetAttribute(name, `{"api-version":"0.2","service":{"serving-ports":["eighty"]}}`)
	}
	answers := func(f platform.Fault) func() func() {
		f.Prefix = "/computeMetadata/"
		return func() func() { return m.Platform.Inject(f) }
	}
	for i, row := range []struct {
		name    string
		trouble func() (end func())
		running bool // the agent is not started anew
		id      symptom.ID
		says    string
	}{
		{"malformed while it runs", func() func() { malform(); return nil }, true, symptom.AttributeBad,
			"The gce-service-proxy attribute cannot be used: attribute gce-service-proxy: key service.serving-ports[0]: want a whole number, have a string; correct it; until then the last good one stays in force"},
		{"404 while it runs", func() func() { m.Platform.DeleteAttribute(name); return nil }, true, symptom.AttributeBad,
			"cannot be used: this VM has no metadata attribute gce-service-proxy; create its template with gcloud compute instance-templates create --service-proxy enabled; or give this VM one"},
		{"404", nil, false, symptom.AttributeBad,
			"cannot be used: this VM has no metadata attribute gce-service-proxy; create its template with gcloud compute instance-templates create --service-proxy enabled; or give this VM one"},
		{"403", answers(platform.Fault{Status: http.StatusForbidden}), false, symptom.MetadataServer, "status 403 Forbidden; it is asked again"},
		{"429", answers(platform.Fault{Status: http.StatusTooManyRequests}), false, symptom.MetadataServer, "status 429 Too Many Requests; it is asked again"},
		{"503", answers(platform.Fault{Status: http.StatusServiceUnavailable}), false, symptom.MetadataServer, "status 503 Service Unavailable; it is asked again"},
		{"hang", answers(platform.Fault{Hang: true}), false, symptom.MetadataServer, "no answer within 10s; it is asked again"},
		{"malformed", func() func() { malform(); return nil }, false, symptom.AttributeBad, "key service.serving-ports[0]"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if !row.running {
				a.Kill()
			}
			if row.trouble != nil {
				if end := row.trouble(); end != nil {
					defer end()
				}
			}
			if !row.running {
				must(t, a.Start())
			}
			_, err := m.CP.Set(services(both(i)))
			must(t, err)
			s, err := a.Wait(within(t, 20*time.Second), "the failure", func(s status.Status) bool {
				return hasFinding(s, row.id) && strings.Contains(s.LastFailure, row.says) && s.Ready
			})
			must(t, err)
			if row.id == symptom.MetadataServer &&
				!strings.HasPrefix(
					s.LastFailure, "The metadata server gives no usable answer about the attribute: ") ||
				!strings.Contains(s.LastFailure, "until then the last good one stays in force") {
				t.Errorf("said: %s", s.LastFailure)
			}
			if s.Attribute == nil || s.Attribute.Kept == row.running || !s.Attribute.Read.Equal(read) {
				t.Errorf("attribute in force: %+v, want that of %v", s.Attribute, read)
			}
			text, _, _, err := a.Run(t.Context(), "status")
			must(t, err)
			if !strings.Contains(text, "read "+read.Format(time.RFC3339)) ||
				strings.Contains(text, "by an earlier run, and kept") == row.running {
				t.Errorf("status: %s", text)
			}
			eventually(t, 15*time.Second, "a new service", func() (bool, string) {
				out := chains(t, m)
				for _, vip := range both(i).Prefixes {
					if !strings.Contains(out, "-d "+vip.String()+" ") {
						return false, out
					}
				}
				return true, out
			})
			_, err = m.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-D", "OUTPUT", "-p", "tcp", "-j",
				"SERVICE_PROXY_OUTPUT")
			must(t, err)
			through(t, m, web4)
			escapes(t, m, db4) // that attribute, and not the defaults
			_, metrics, err := a.Get("/metrics")
			must(t, err)
			for _, id := range []symptom.ID{symptom.AttributeBad, symptom.MetadataServer} {
				stands := fmt.Sprintf("service_proxy_agent_finding{id=%q,severity=\"error\"} 1\n", id)
				if strings.Contains(metrics, stands) != (id == row.id) {
					t.Errorf("%s: want %q in the metrics only where it stands", row.id, stands)
				}
			}
		})
	}
	m.Platform.SetAttribute(name, mesh.Attribute)
	through(t, m, db4)
	s, err = a.Wait(within(t, 5*time.Second), "the end of the failure", func(s status.Status) bool {
		return strings.Contains(s.LastFailure, "(over; ")
	})
	must(t, err)
	if s.Attribute.Kept || !s.Attribute.Read.After(read) {
		t.Errorf("attribute in force: %+v", s.Attribute)
	}

	// Another VM, made of this one's disk.
	a.Kill()
	m.Platform.Update(func(v *platform.VM) { v.ID++; delete(v.Attributes, name) })
	before := chains(t, m)
	const discarded = "\tState of another VM (instance 4520031799277581759) was found at the start and discarded"
	// Nothing but the id tells that this is not the VM that it was: as in a container that is copied.
	must(t, a.Start())
	a.Ended()
	if !strings.Contains(a.Log(), "starting anew") {
		t.Errorf("it ended by something else:\n%s", a.Log())
	}
	for range 2 { // said once
		must(t, a.Start())
		s, err := a.Wait(within(t, 10*time.Second), "the failure on a clone", func(s status.Status) bool {
			return hasFinding(s, symptom.AttributeBad) &&
				strings.Contains(s.LastFailure, "until then the rules stay as they are")
		})
		must(t, err)
		if s.Attribute != nil || s.Ready {
			t.Errorf("on a clone: ready %v, attribute in force %+v", s.Ready, s.Attribute)
		}
		eventually(t, 5*time.Second, "the kept attribute is discarded", func() (bool, string) {
			_, err := os.Stat(m.Dir + "/agent/state/attribute.json")
			return os.IsNotExist(err) && strings.Count(a.Log(), discarded) == 1, a.Log()
		})
		a.Kill()
	}
	if after := chains(t, m); after != before {
		t.Errorf("the rules changed on a clone:\n%s\nbefore:\n%s", after, before)
	}
}
