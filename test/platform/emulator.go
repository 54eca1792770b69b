// Package platform is an emulator of what Compute Engine gives a VM and its owner, as far as
// this project meets it:
//
//   - the metadata server: attributes, recursion, long polls with ETags, tokens, guest attributes
//     with their documented budget counted;
//   - the Compute API calls by which gcloud reads a VM from outside (getGuestAttributes,
//     serialPort, instances.get), and sets metadata of the VM or of its project;
//   - Cloud Logging's entries:write and entries:list;
//   - Cloud Storage's reads, JSON and XML form, with the VM's own token.
//
// Unmodified gcloud works against it (GcloudEnv), so does the Go metadata package
// (GCE_METADATA_HOST). One Emulator is one VM; several may be of one Project. Everything is served
// by one http.Handler, since the paths of the services do not overlap: give it as many listeners as
// there are addresses to stand for (Serve), with TLS where the real one has it (package authority,
// below this one).
//
// What each part does is as its real one was seen or is documented, and says where; what is not
// known of the real one is said there too:
//
//   - metadata server: https://cloud.google.com/compute/docs/metadata/querying-metadata and
//     .../predefined-metadata-keys for paths, headers, wait_for_change, last_etag, timeout_sec,
//     recursive, alt; the words of its errors are made up but for guest attributes' 403
//     (GoogleCloudPlatform/osconfig#411). ETags there are opaque, here a hash;
//   - guest attributes: https://cloud.google.com/compute/docs/metadata/manage-guest-attributes, its
//     budget too. Which write is lost beyond the budget, and how large a value may be, is not
//     documented;
//   - Compute API, Cloud Logging: what unmodified gcloud was seen to send and print (TestGcloud),
//     and the reference pages of the methods;
//   - Cloud Storage: see storage.
//
// Faults are the test's to choose (Inject). What nobody asks for is not here: an unknown path is a
// 404 in the service's own words, an unknown filter of entries:list a 400 that names it. It writes
// no file and knows no iptables or Envoy.
package platform

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// VM is what the metadata server says of the VM. Zero fields take the values in brackets.
type VM struct {
	ProjectID     string // [my-project]
	ProjectNumber int64  // [123456789012]
	Zone          string // [us-central1-a]
	Name          string // [vm-1]
	ID            uint64 // [4520031799277581759]
	Network       string // [default]
	IP, IPv6      string // of the first interface [10.128.0.2, none]; "none": no IPv4
	// e-mail [123456789012-compute@developer.gserviceaccount.com]; "none": the VM has no account
	ServiceAccount string
	Scopes         []string // [cloud-platform]
	// Attributes are the instance's; gce-service-proxy is one of them.
	Attributes map[string]string
	// Project has the project's, which its VMs share [one of this VM's own].
	Project *Project
	// GuestAttributesDisabled is a VM without enable-guest-attributes=TRUE.
	GuestAttributesDisabled bool
}

// CloudPlatform is the scope that gcloud's --service-proxy adds.
const CloudPlatform = "https://www.googleapis.com/auth/cloud-platform"

func (v *VM) fill() {
	set := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	set(&v.ProjectID, "my-project")
	set(&v.Zone, "us-central1-a")
	set(&v.Name, "vm-1")
	set(&v.Network, "default")
	set(&v.IP, "10.128.0.2")
	if v.ProjectNumber == 0 {
		v.ProjectNumber = 123456789012
	}
	if v.ID == 0 {
		v.ID = 4520031799277581759
	}
	set(&v.ServiceAccount, fmt.Sprintf("%d-compute@developer.gserviceaccount.com", v.ProjectNumber))
	if v.Scopes == nil {
		v.Scopes = []string{CloudPlatform}
	}
	v.Attributes = maps.Clone(v.Attributes)
	if v.Attributes == nil {
		v.Attributes = make(map[string]string)
	}
	if v.Project == nil {
		v.Project = NewProject()
	}
}

// Emulator is one VM's platform. Its methods may be called from several goroutines.
type Emulator struct {
	token string

	mu       sync.Mutex
	vm       VM
	changed  chan struct{} // closed and replaced at each change that the metadata server shows
	changes  int           // of the instance's metadata by the API: its fingerprint
	guest    map[string]map[string]string
	budget   budget
	faults   []*Fault
	requests []Request
	offset   time.Duration
	serial   []byte
	logs     []LogEntry
	buckets  map[string]*bucket
	servers  []*http.Server
}

// New makes an emulator of a VM. It listens nowhere until Serve.
func New(vm VM) *Emulator {
	vm.fill()
	e := &Emulator{
		vm: vm, token: "test-token-" + rand.Text(), changed: make(chan struct{}),
		guest: make(map[string]map[string]string), buckets: make(map[string]*bucket),
	}
	vm.Project.join(e)
	return e
}

// Serve answers on ln until Close; with a certificate, by TLS.
func (e *Emulator) Serve(ln net.Listener, certificate *tls.Certificate) {
	if certificate != nil {
		ln = tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{*certificate}})
	}
	s := &http.Server{Handler: e, ReadHeaderTimeout: 10 * time.Second}
	e.mu.Lock()
	e.servers = append(e.servers, s)
	e.mu.Unlock()
	go s.Serve(ln) // ends by Close
}

// Close ends every server, and with them what hangs or polls. It is an error of whoever ran on
// this VM if the budget of guest attributes was exceeded, in any test: what the real one then
// does cannot be seen here.
func (e *Emulator) Close() error {
	e.mu.Lock()
	servers := e.servers
	e.servers = nil
	e.mu.Unlock()
	for _, s := range servers {
		s.Close()
	}
	if b := e.Budget(); !b.Kept() {
		var all []string
		for _, r := range e.Requests() {
			if key, ok := strings.CutPrefix(r.Path, guestPath); ok {
				all = append(all, fmt.Sprintf("%s %s %s", r.At.UTC().Format("15:04:05.000"), r.Method, key))
			}
		}
		return fmt.Errorf(
			"guest attributes: %d queries within a minute, %d within a second, %d of ours within a "+
				"minute; the budget is %d, %d and %d: %s",
			b.PeakPerMinute, b.PeakPerSecond, b.OursPerMinute, BudgetPerMinute, BudgetPerSecond,
			OursPerMinute, strings.Join(all, ", "))
	}
	return nil
}

// Update changes the VM: attributes, scopes, guest attributes on or off. Long polls see it.
func (e *Emulator) Update(change func(*VM)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.vm)
	e.notify()
}

// SetAttribute sets an instance attribute.
func (e *Emulator) SetAttribute(key, value string) {
	e.Update(func(v *VM) { v.Attributes[key] = value })
}

// DeleteAttribute removes an instance attribute.
func (e *Emulator) DeleteAttribute(key string) {
	e.Update(func(v *VM) { delete(v.Attributes, key) })
}

// SetClock shifts the emulator's clock, as its Date header tells it, against this machine's.
func (e *Emulator) SetClock(offset time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.offset = offset
}

// Token is the access token that the metadata server hands out and the other services want.
func (e *Emulator) Token() string { return e.token }

// notify wakes long polls and waiters; e.mu is held.
func (e *Emulator) notify() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// Wait blocks until holds, looking after each change that the metadata server shows (guest
// attributes included), log entry and serial line.
func (e *Emulator) Wait(ctx context.Context, holds func() bool) error {
	for {
		e.mu.Lock()
		changed := e.changed
		e.mu.Unlock()
		if holds() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for emulator: %w", ctx.Err())
		}
	}
}

// Fault is something that goes wrong. The first that matches counts.
type Fault struct {
	// of the path, e.g. "/computeMetadata/v1/instance/guest-attributes/"; empty: everything
	Prefix string
	Method string // empty: any
	Status int    // answered instead; 0: the answer is as usual (with Delay: slow)
	Body   string
	Header map[string]string
	Delay  time.Duration // before the answer
	Hang   bool          // no answer until the client gives up or the fault is removed
	Times  int           // after so many requests the fault is over; 0: stays until removed

	gone chan struct{}
}

// Inject adds a fault; the returned function removes it.
func (e *Emulator) Inject(f Fault) (remove func()) {
	p := &f
	p.gone = make(chan struct{})
	e.mu.Lock()
	e.faults = append(e.faults, p)
	e.mu.Unlock()
	return sync.OnceFunc(func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.faults = slices.DeleteFunc(e.faults, func(x *Fault) bool { return x == p })
		close(p.gone)
	})
}

// fault is the one that r meets, or nil.
func (e *Emulator) fault(r *http.Request) *Fault {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, f := range e.faults {
		if !strings.HasPrefix(r.URL.Path, f.Prefix) || f.Method != "" && f.Method != r.Method {
			continue
		}
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				e.faults = slices.Delete(e.faults, i, i+1)
			}
		}
		return f
	}
	return nil
}

// Request is one that came in.
type Request struct {
	At            time.Time
	Method, Host  string
	Path, Query   string
	Authorization bool
}

// Requests lists what came in, oldest first; the newest 10,000.
func (e *Emulator) Requests() []Request {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.requests)
}

// ServeHTTP routes to the service that the path belongs to.
func (e *Emulator) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	if len(e.requests) == 10_000 {
		e.requests = slices.Delete(e.requests, 0, 1)
	}
	e.requests = append(e.requests, Request{
		At: time.Now(), Method: r.Method, Host: r.Host, Path: r.URL.Path, Query: r.URL.RawQuery,
		Authorization: r.Header.Get("Authorization") != "",
	})
	if strings.HasPrefix(r.URL.Path, guestPath) {
		e.budget.count(time.Now(), r.URL.Path) // a query counts whatever becomes of it
	}
	w.Header().Set("Date", time.Now().Add(e.offset).UTC().Format(http.TimeFormat))
	e.mu.Unlock()

	if f := e.fault(r); f != nil {
		if f.Hang {
			select {
			case <-r.Context().Done():
			case <-f.gone:
			}
			panic(http.ErrAbortHandler)
		}
		select {
		case <-time.After(f.Delay):
		case <-r.Context().Done():
			return
		}
		if f.Status != 0 {
			for key, value := range f.Header {
				w.Header().Set(key, value)
			}
			if strings.HasPrefix(r.URL.Path, metadataPath) {
				w.Header().Set("Metadata-Flavor", "Google") // the real one's errors have it too
			}
			http.Error(w, f.Body, f.Status)
			return
		}
	}
	switch path := r.URL.Path; {
	case path == "/" && r.Host != storageHost, strings.HasPrefix(path, "/computeMetadata"):
		e.metadata(w, r)
	case strings.HasPrefix(path, "/compute/v1/"):
		e.compute(w, r)
	case strings.HasPrefix(path, "/v2/entries:"):
		e.logging(w, r)
	default:
		e.storage(w, r)
	}
}

// authorized says whether r bears the VM's token, and answers 401 if not.
func (e *Emulator) authorized(w http.ResponseWriter, r *http.Request) bool {
	if r.Header.Get("Authorization") == "Bearer "+e.token {
		return true
	}
	w.Header().Set("WWW-Authenticate", "Bearer")
	apiError(w, http.StatusUnauthorized,
		"Request had invalid authentication credentials. Expected OAuth 2 access token.")
	return false
}
