package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// demo is one run.
type demo struct {
	*narrator
	envoyBinary string
	began       time.Time

	step  int
	title string

	mesh     *mesh.Mesh
	agent    *mesh.Agent
	services []controlplane.Service
	taken    []controlplane.Service // by Envoy, of those; kept by play
	version  string                 // Envoy's, as /server_info has it
}

// patience is how long a step may take. What it waits for takes milliseconds, but on a busy
// machine Envoy takes seconds to start; gcloud does on any, and was seen to take 20 s on
// one that was very busy.
const (
	patience       = 10 * time.Second
	gcloudPatience = 2 * time.Minute
)

// vip is a service's port: no server in the lab listens there, so that a connection which nobody
// redirects is refused.
const vipPort = 80

// service is an HTTP service at a VIP with one endpoint, the n-th.
func service(name string, n byte, vips ...string) controlplane.Service {
	return controlplane.Service{Name: name, Prefixes: controlplane.VIPs(vips...),
		Port: vipPort, HTTP: true,
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(n), mesh.EndpointPort)}}
}

var (
	web  = service("web", 1, "10.10.0.1", "fd10::1")
	shop = service("shop", 2, "10.10.0.2")
)

// config is the mesh with the services of now.
func (d *demo) config() controlplane.Config {
	return controlplane.Config{IPv6: controlplane.IPv6Additional, Services: d.services,
		Inbound: []controlplane.Inbound{{Addr: lab.VMAddr, Port: mesh.AppPort, HTTP: true}}}
}

// push has the control plane send the services of now.
func (d *demo) push() (controlplane.Push, error) { return d.mesh.CP.Set(d.config()) }

// steps is the whole show, in order. The first that does not hold ends it.
func (d *demo) steps(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err // during prepare
	}
	d.line(d.in(bold, "service-proxy-agent, the main job on real parts"))
	d.say(
		"What follows `vm#` is run in the VM, `client$` in another machine, `you$` on your desk. " +
			"Output is real, cut to what matters.")
	for i, s := range []struct {
		title string
		limit time.Duration
		run   func(context.Context) error
	}{
		{"A VM with Envoy, and nobody who redirects", patience, d.envoyAlone},
		{"The agent starts", patience, d.agentStarts},
		{"A second service appears", patience, d.serviceAppears},
		{"Somebody deletes a rule", patience, d.ruleDeleted},
		{"A service goes away", patience, d.serviceGoes},
		{"A serving port, from another machine", patience, d.inbound},
		{"What the agent says on the VM", patience, d.status},
		{"What the VM says to those who cannot log in", gcloudPatience, d.outside},
	} {
		d.step, d.title = i+1, s.title
		d.heading(fmt.Sprintf("%d. %s", d.step, d.title))
		limited, cancel := context.WithTimeout(ctx, s.limit)
		err := s.run(limited)
		cancel()
		if err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
	}
	return nil
}

// prepare makes everything but Envoy and the agent.
func (d *demo) prepare(ctx context.Context) (err error) {
	// Envoy's own user must reach what it reads.
	if !forEverybody(os.TempDir()) {
		os.Setenv("TMPDIR", "/tmp")
	}
	d.services = []controlplane.Service{web}
	if d.mesh, err = mesh.New(ctx, mesh.Options{Config: d.config(), NoEnvoy: true}); err != nil {
		return err
	}
	// The Compute API, where those outside of the VM ask.
	api, err := d.mesh.Listen(d.mesh.Service, netip.AddrPortFrom(lab.ControlPlaneAddr, apiPort))
	if err != nil {
		return err
	}
	d.mesh.Platform.Serve(api, nil)
	return nil
}

// envoyAlone starts Envoy, and no agent yet.
func (d *demo) envoyAlone(ctx context.Context) (err error) {
	m := d.mesh
	if m.Envoy, err = m.StartEnvoy(
		lab.EnvoyOptions{Binary: d.envoyBinary, ControlPlane: m.CPAddr, Runtime: true}); err != nil {
		return err
	}
	if err := m.Envoy.WaitReady(ctx); err != nil {
		return err
	}
	push, err := d.push()
	if err != nil {
		return err
	}
	if err := m.CP.WaitAccepted(ctx, push); err != nil {
		return err
	}
	if d.version, err = envoyVersion(ctx, m.Envoy); err != nil {
		return err
	}
	d.tell(
		"Three network namespaces are joined by veth: the VM, a client, and all the rest (endpoints, "+
			"metadata server, control plane). "+
			"Envoy %s runs in the VM as uid %d and knows the service web from the control plane, 10.10.0.1 "+
			"and fd10::1, port 80.", short(d.version), m.Envoy.UID)
	code, out, err := d.curl(ctx, d.vm(), "http://10.10.0.1/")
	if err != nil {
		return err
	}
	if code == 0 {
		return fmt.Errorf("10.10.0.1 answers although nothing redirects to Envoy: %s", out)
	}
	d.ok("no answer: no packet for 10.10.0.1 gets to Envoy without a rule")
	return nil
}

// agentStarts starts the agent and reaches the first service by it.
func (d *demo) agentStarts(ctx context.Context) error {
	a := d.mesh.NewAgent()
	started := time.Now()
	if err := a.Start(); err != nil {
		return err
	}
	d.agent = a
	took, err := d.reachable(ctx, web, started)
	if err != nil {
		return d.withLog(err)
	}
	d.prompt(d.vm().prompt, commandLine(d.agent.PID())+" &")
	d.ok("the first redirected connection came through %s after the start", ms(took))
	if err := d.agent.WaitReady(ctx); err != nil {
		return err
	}
	for _, url := range []string{"http://10.10.0.1/", "http://[fd10::1]/"} {
		if err := d.answers(ctx, d.vm(), url, "web", "10.130.0.1:8080"); err != nil {
			return err
		}
	}
	d.ok(
		"Envoy answers for the service (`server: envoy`, `x-served-by: web`) and the endpoint saw " +
			"Envoy's connection, not one to the VIP")
	return d.chain(ctx, "SERVICE_PROXY_SERVICE_CIDRS", map[string]int{"10.10.0.1": 1})
}

// serviceAppears adds a service at the control plane.
func (d *demo) serviceAppears(ctx context.Context) error {
	reach, err := lab.HTTPProbe(ctx, d.mesh.VM, 0, vip(shop))
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("10.10.0.2 should refuse connections before it is a service: %+v, %v",
			reach, err)
	}
	d.services = []controlplane.Service{web, shop}
	quiet(ctx)
	push, err := d.push()
	if err != nil {
		return err
	}
	took, err := d.reachable(ctx, shop, push.At)
	if err != nil {
		return d.withLog(err)
	}
	d.tell(
		"The control plane sends one service more: shop, 10.10.0.2. Nobody tells the agent: it sees " +
			"what Envoy listens for.")
	d.ok("%s from the push to the first redirected connection", ms(took))
	if err := d.answers(ctx, d.vm(), "http://10.10.0.2/", "shop", "10.130.0.2:8080"); err != nil {
		return err
	}
	return d.chain(ctx, "SERVICE_PROXY_SERVICE_CIDRS", map[string]int{"10.10.0.1": 1, "10.10.0.2": 1})
}

// ruleDeleted deletes a rule by hand and waits for it.
func (d *demo) ruleDeleted(ctx context.Context) error {
	// Once the agent has ended its own write: who writes in the middle of that is repaired too,
	// but is not always named.
	before, err := d.agent.Wait(ctx, "both services in its status", func(s status.Status) bool {
		return len(s.Families) > 0 && s.Families[0].Services == len(d.services) && s.Families[0].Equal
	})
	if err != nil {
		return err
	}
	rule := []string{"SERVICE_PROXY_SERVICE_CIDRS", "-d", "10.10.0.1/32", "-j",
		"SERVICE_PROXY_REDIRECT"}
	deletion := d.command(ctx, d.vm(), "iptables", append([]string{"-t", "nat", "-D"}, rule...)...)
	if code, out, err := deletion.run(); err != nil || code != 0 {
		return fmt.Errorf("delete the rule: exit code %d: %s (%v)", code, out, err)
	}
	deleted := time.Now()
	// -C looks without changing anything.
	for {
		if _, err := d.mesh.VM.Run(
			ctx, "iptables", append([]string{"-t", "nat", "-C"}, rule...)...); err == nil {
			break
		}
		if ctx.Err() != nil {
			return d.withLog(errors.New("the deleted rule did not come back"))
		}
	}
	back := time.Since(deleted)
	d.ok(
		"the rule is back, at most %s after `iptables -D` had ended (which is how long it took to look)",
		ms(back))
	by := fmt.Sprintf("iptables (pid %d)", deletion.pid())
	after, err := d.agent.Wait(ctx, "the repair in its status", func(s status.Status) bool {
		return s.Undone > before.Undone
	})
	if err != nil {
		return err
	}
	if after.LastDriftBy != by {
		return d.withLog(
			fmt.Errorf("the rule was deleted by %s, and the agent names %q", by, after.LastDriftBy))
	}
	d.ok("the agent knows who it was: %s", by)
	return d.answers(ctx, d.vm(), "http://10.10.0.1/", "web", "10.130.0.1:8080")
}

// serviceGoes takes it away again.
func (d *demo) serviceGoes(ctx context.Context) error {
	d.services = []controlplane.Service{web}
	quiet(ctx)
	push, err := d.push()
	if err != nil {
		return err
	}
	took, err := d.gone(ctx, shop, push.At)
	if err != nil {
		return d.withLog(err)
	}
	d.tell("The control plane takes shop away.")
	d.ok("%s from the push to the first connection that is not redirected", ms(took))
	code, out, err := d.curl(ctx, d.vm(), "http://10.10.0.2/")
	if err != nil {
		return err
	}
	if code == 0 {
		return fmt.Errorf("10.10.0.2 still answers: %s", out)
	}
	if err := d.answers(ctx, d.vm(), "http://10.10.0.1/", "web", "10.130.0.1:8080"); err != nil {
		return err
	}
	if err := d.chain(ctx, "SERVICE_PROXY_SERVICE_CIDRS",
		map[string]int{"10.10.0.1": 1, "10.10.0.2": 0}); err != nil {
		return err
	}
	d.ok("shop is out of reach and out of the chain, web is as it was")
	return nil
}

// inbound calls the VM's serving port from the client.
func (d *demo) inbound(ctx context.Context) error {
	d.tell(
		"An application listens on port %d of the VM, which the gce-service-proxy attribute names as a "+
			"serving port.", mesh.AppPort)
	url := fmt.Sprintf("http://%s:%d/", lab.VMAddr, mesh.AppPort)
	if err := d.answers(ctx, d.client(), url, fmt.Sprintf("inbound-%d-%s", mesh.AppPort, lab.VMAddr),
		fmt.Sprintf("127.0.0.1:%d", mesh.AppPort)); err != nil {
		return err
	}
	if err := d.chain(ctx, "SERVICE_PROXY_INBOUND",
		map[string]int{fmt.Sprintf("dpt:%d", mesh.AppPort): 1}); err != nil {
		return err
	}
	d.tell("settling: leaves connections alone that are older than the rules, for five minutes.")
	d.tell("routed-through: what the VM only forwards (its containers' traffic) is not inbound.")
	d.ok("Envoy's inbound listener took the call and handed it to the application")
	return nil
}

// status asks the agent.
func (d *demo) status(ctx context.Context) error {
	d.prompt(d.vm().prompt, "service-proxy-agent status")
	out, stderr, code, err := d.agent.Run(ctx, "status")
	d.output(out + stderr)
	if err != nil {
		return err
	}
	s, err := d.agent.Status(ctx)
	if err != nil {
		return err
	}
	switch {
	case code != 0:
		return fmt.Errorf("status: exit code %d, the agent is not healthy", code)
	case !s.Ready || s.Mode != "intercepting":
		return fmt.Errorf("the agent is %s and not ready: %s", s.Mode, s.NotReady)
	case !strings.Contains(out, s.LastDriftBy):
		return fmt.Errorf("status does not name %s, who deleted the rule", s.LastDriftBy)
	}
	d.ok("exit code 0: healthy, ready, and the hand that deleted the rule is named")
	return nil
}

// withLog adds the agent's own words to an error.
func (d *demo) withLog(err error) error {
	text := d.agent.Log()
	if text == "" {
		return fmt.Errorf("%w\nThe agent's log is empty.", err)
	}
	return fmt.Errorf("%w\nThe agent's log ends:\n%s", err, last(text, 15))
}

// tails shows what Envoy said, when it may have to do with err.
func (d *demo) tails(err error) {
	var signal signalled
	if d.mesh == nil || d.mesh.Envoy == nil || errors.As(err, &signal) {
		return
	}
	if d.mesh.Envoy.PID() == 0 {
		d.line("Envoy has ended; its log ends:")
		d.line(d.mesh.Envoy.LogTail(10))
	}
}

// close takes everything down and looks whether anything is left.
func (d *demo) close() error {
	if d.mesh == nil { // mesh.New took down what it had made
		return nothingIn(fmt.Sprintf("/run/netns/spa-%d-*", os.Getpid()))
	}
	pids := map[string]int{}
	if d.mesh.Envoy != nil {
		pids["Envoy"] = d.mesh.Envoy.PID()
	}
	// Before the lab goes: the agent keeps files in its folder.
	if d.agent != nil {
		pids["the agent"] = d.agent.PID()
		d.stopAgent()
	}
	if err := d.mesh.Close(); err != nil {
		return err
	}
	left := []error{nothingIn(fmt.Sprintf("/run/netns/spa-%d-*", os.Getpid())), nothingIn(d.mesh.Dir)}
	for name, pid := range pids {
		if pid != 0 && syscall.Kill(pid, 0) == nil {
			left = append(left, fmt.Errorf("%s (pid %d) still runs", name, pid))
		}
	}
	return errors.Join(left...)
}

// nothingIn is an error that names the files of a pattern, if there are any.
func nothingIn(pattern string) error {
	files, err := filepath.Glob(pattern)
	if err == nil && len(files) > 0 {
		err = fmt.Errorf("left: %s", strings.Join(files, ", "))
	}
	return err
}

// stopAgent asks it to end and insists after 3 s; it is to end within 2.
func (d *demo) stopAgent() {
	insist := time.AfterFunc(3*time.Second, d.agent.Kill)
	defer insist.Stop()
	if _, err := d.agent.Stop(); err != nil {
		d.agent.Kill() // it has ended, in whatever way
	}
}

// quiet leaves Envoy alone for a moment: the agent asks for all of its listeners at once when one
// changed after a quiet time, and not five times a second when one change follows another, as they
// would here and seldom do in a mesh.
func quiet(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(500 * time.Millisecond):
	}
}

// reachable waits for the first connection to a service that is redirected and answered, and says
// how long after since it began.
func (d *demo) reachable(ctx context.Context, s controlplane.Service,
	since time.Time) (time.Duration, error) {
	// Short at first: an answer without a service's (a 503) ends only after Envoy's
	// delayed_close_timeout of 1 s.
	limit := 50 * time.Millisecond
	return retry(ctx, since, fmt.Sprintf("%s to be redirected to Envoy", vip(s)), func() error {
		one, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		limit = min(2*limit, 2*time.Second)
		reach, err := lab.HTTPProbe(one, d.mesh.VM, 0, vip(s))
		if err == nil && reach.Escaped {
			err = fmt.Errorf("a server at %s itself answered", reach.Local)
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			limit = 50 * time.Millisecond // which costs no time at all
		}
		return err
	})
}

// gone waits for the first connection that arrives at the VIP itself, where nobody listens.
func (d *demo) gone(ctx context.Context, s controlplane.Service,
	since time.Time) (time.Duration, error) {
	return retry(ctx, since, fmt.Sprintf("%s to be redirected no longer", vip(s)), func() error {
		conn, err := d.mesh.VM.Dial(ctx, vip(s))
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		if err != nil {
			return err
		}
		return errors.Join(errors.New("it was accepted"), conn.Close())
	})
}

// retry calls try every 2 ms until it holds, and says how long after since the one that held began.
func retry(ctx context.Context, since time.Time, what string,
	try func() error) (time.Duration, error) {
	var why error // of the last try that ctx did not cut
	for {
		began := time.Now()
		err := try()
		if err == nil {
			return max(0, began.Sub(since)), nil
		}
		if ctx.Err() == nil || why == nil {
			why = err
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for %s: the last connection: %w", what, why)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// vip is where a service is called.
func vip(s controlplane.Service) netip.AddrPort {
	return netip.AddrPortFrom(s.Prefixes[0].Addr(), vipPort)
}

func ms(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) + " ms" }

// envoyVersion is what Envoy says of itself.
func envoyVersion(ctx context.Context, e *lab.Envoy) (string, error) {
	text, err := e.Admin(ctx, "/server_info")
	if err != nil {
		return "", err
	}
	var info struct{ Version string }
	if err := json.Unmarshal([]byte(text), &info); err != nil {
		return "", fmt.Errorf("read Envoy's /server_info: %w", err)
	}
	if info.Version == "" {
		return "", fmt.Errorf("read Envoy's /server_info: no version in %q", text)
	}
	return info.Version, nil
}

// short is the 1.40.0 of COMMIT/1.40.0/Clean/RELEASE/BoringSSL.
func short(version string) string {
	if parts := strings.Split(version, "/"); len(parts) > 1 {
		return parts[1]
	}
	return version
}

// forEverybody says whether any user may read and run path, folders on the way included: a checkout
// under /root is out of reach for Envoy's user.
func forEverybody(path string) bool {
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm()&0o005 != 0o005 {
		return false
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm()&0o001 == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
	}
}

// last is the last n lines of text.
func last(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
