//go:build lab

package e2e

import (
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// refusals is a mesh whose control plane says no.
type refusals struct {
	*mesh.Mesh
	agent  *mesh.Agent
	extras int
}

func startRefusals(t *testing.T) *refusals {
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	return &refusals{Mesh: m, agent: a}
}

// speak makes the control plane answer again, with a new service so that it has something to say.
func (r *refusals) speak(t *testing.T) {
	r.extras++
	r.CP.Serve()
	_, err := r.CP.Set(services(service(r.extras)))
	must(t, err)
}

// check refuses, waits until that is named by all of want in agent-last-failure, and until it is
// over after ok. The rules and what goes through them stay.
func (r *refusals) check(t *testing.T, refuse, ok func(), id symptom.ID, want ...string) {
	t.Helper()
	before := chains(t, r.Mesh)
	refuse()
	_, err := r.agent.Wait(within(t, 60*time.Second), "the refusal is named",
		func(s status.Status) bool {
			for _, text := range want {
				if !strings.Contains(s.LastFailure, text) {
					return false
				}
			}
			return hasFinding(s, id) && strings.Contains(s.LastFailure, "(since ")
		})
	must(t, err)
	if now := chains(t, r.Mesh); now != before {
		t.Errorf("the rules changed:\n%s\nbefore:\n%s", now, before)
	}
	through(t, r.Mesh, web4)
	ok()
	// Envoy's own back-off is up to 30 s
	_, err = r.agent.Wait(within(t, 60*time.Second), "it is over", func(s status.Status) bool {
		return len(s.Findings) == 0 && s.Ready && strings.Contains(s.LastFailure, "(over; ")
	})
	must(t, err)
	if r.extras == 0 {
		return
	}
	// The stream stands before what it brings is in the rules.
	for ctx, newest := within(t, 20*time.Second), service(r.extras).Prefixes[0].String(); ; time.Sleep(
		10 * time.Millisecond) {
		rules, err := r.Chains(ctx, "IPv4")
		must(t, err)
		if strings.Contains(rules, newest) {
			return
		}
	}
}

// TestControlPlaneRefuses: whatever the control plane says no to is named with its next step, and
// it is over by itself once the control plane has changed its mind.
func TestControlPlaneRefuses(t *testing.T) {
	t.Parallel()
	r := startRefusals(t)
	speak := func() { r.speak(t) }
	// Over though nothing is new at the control plane, so that Envoy logs nothing.
	r.check(t, r.CP.RefusePermission, r.CP.Serve, symptom.PermissionDenied,
		"Cannot reach the Traffic Director API server: Permission denied", "grant roles/trafficdirector.client to ", "gserviceaccount.com")
	r.check(t, func() { r.CP.RefuseDisabled("123456789012") }, speak, symptom.APINotEnabled,
		"the API is not enabled in project 123456789012", "gcloud services enable trafficdirector.googleapis.com --project=123456789012")
	r.check(t, func() { r.CP.RefuseNotFound("default", "my-project") }, speak, symptom.ConfigNotFound,
		`configuration was not found for network "default" in project "my-project"`, "create a forwarding rule")
	r.check(t, r.CP.RefuseUnknownEntity, speak, symptom.ConfigNotFound,
		"Requested entity was not found", "check the mesh, scope or network name")
	r.check(t, func() {
		bad := services(service(r.extras))
		bad.Listeners = append(
			bad.Listeners, controlplane.RefusedListener("bad", 16001, "/root/access.log"))
		_, err := r.CP.Set(bad)
		must(t, err)
	}, speak, symptom.AccessLogUnwritable, "Envoy rejected listener bad", "/root/access.log")
	// Envoy's reason holds the whole message.
	const secret = "s3cr3t"
	r.check(t, func() {
		bad := services(service(r.extras))
		bad.Listeners = append(bad.Listeners, quotedListener(t, "quoted", 16002, "Bearer "+secret))
		_, err := r.CP.Set(bad)
		must(t, err)
		must(t, r.CP.WaitRejected(within(t, 10*time.Second), 2))
		if n := r.CP.Rejections(); !strings.Contains(n[len(n)-1].Details, secret) {
			t.Errorf("Envoy says %q, which holds no header", n[len(n)-1].Details)
		}
		_, err = r.agent.Wait(within(t, 10*time.Second), "the failure", func(s status.Status) bool {
			return strings.Contains(s.LastFailure, "quoted")
		})
		must(t, err)
		r.quiet(t, secret)
	}, speak, symptom.ListenerRejected,
		"Envoy rejected listener quoted: Proto constraint validation failed (HttpConnectionManager.RouteConfig.VirtualHosts[0].Routes[0].RequestHeadersToAdd[0].AppendAction: value must be one of the defined enum values); services")
	r.quiet(t, secret)
}

// quiet checks that nothing that leaves the VM holds the secret, nor the agent's own log.
func (r *refusals) quiet(t *testing.T, secret string) {
	t.Helper()
	status, _, _, err := r.agent.Run(t.Context(), "status", "-o", "json")
	must(t, err)
	for what, text := range map[string]string{
		"status -o json": status, "agent-last-failure": r.Platform.GuestAttributes("gce-service-proxy")["agent-last-failure"],
		"serial": r.Platform.Serial(), "the agent's log": r.agent.Log(),
	} {
		if text == "" || strings.Contains(text, secret) {
			t.Errorf("%s holds the secret, or nothing at all:\n%s", what, text)
		}
	}
}

// quotedListener is a listener that Envoy refuses for a header that it adds, whose value it quotes.
func quotedListener(t *testing.T, name string, port uint16, value string) *listenerv3.Listener {
	pack := func(m proto.Message) *anypb.Any {
		packed, err := anypb.New(m)
		must(t, err)
		return packed
	}
	route := &routev3.Route{
		Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action: &routev3.Route_Route{
			Route: &routev3.RouteAction{
				ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "cluster-web"}}},
		RequestHeadersToAdd: []*corev3.HeaderValueOption{{
			Header: &corev3.HeaderValue{Key: "authorization", Value: value}, AppendAction: 99,
		}},
	}
	l := controlplane.RefusedListener(name, port, "")
	l.FilterChains = []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
		Name: "http", ConfigType: &listenerv3.Filter_TypedConfig{
			TypedConfig: pack(&hcmv3.HttpConnectionManager{
				StatPrefix: "x",
				HttpFilters: []*hcmv3.HttpFilter{
					{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(&routerv3.Router{})}}},
				RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{
					RouteConfig: &routev3.RouteConfiguration{
						Name: "r", VirtualHosts: []*routev3.VirtualHost{
							{Name: "v", Domains: []string{"*"}, Routes: []*routev3.Route{route}}},
					}},
			})},
	}}}}
	return l
}

// TestControlPlaneBusy: Envoy logs an end of its stream that it hopes will pass only after 30 s.
func TestControlPlaneBusy(t *testing.T) {
	t.Parallel()
	r := startRefusals(t)
	r.check(t, func() {
		r.CP.Refuse(codes.ResourceExhausted, "Quota exceeded.")
	}, func() { r.speak(t) }, symptom.ControlPlaneRefused, "Quota exceeded (gRPC code 8)")
}

// TestControlPlaneUnreachable: Envoy logs that the stream was reset, and nothing of the connections
// that are refused then.
func TestControlPlaneUnreachable(t *testing.T) {
	t.Parallel()
	r := startRefusals(t)
	r.check(t, r.CP.GoAway, func() {
		must(t, r.CP.ComeBack())
		r.speak(t)
	}, symptom.ControlPlaneConnect,
		"Cannot reach the Traffic Director API server: connect ", "connection refused")
}
