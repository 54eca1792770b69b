package controlplane_test

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

// client is the xDS side of an Envoy that asks for listeners alone.
type client struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
}

func start(t *testing.T, opts controlplane.Options) *controlplane.Server {
	t.Helper()
	var addr = "127.0.0.1:0"
	opts.Listen = func() (net.Listener, error) {
		ln, err := net.Listen("tcp", addr)
		if err == nil {
			addr = ln.Addr().String()
		}
		return ln, err
	}
	s := controlplane.New(opts)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func connect(t *testing.T, s *controlplane.Server, creds credentials.TransportCredentials) *client {
	t.Helper()
	conn, err := grpc.NewClient(s.Addr().String(), grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer x")
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(
		ctx, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, stream: stream}
	c.send(&discoveryv3.DiscoveryRequest{
		TypeUrl: resourcev3.ListenerType,
		Node: &corev3.Node{Id: "projects/1/networks/n/nodes/u", Cluster: "cluster",
			Locality: &corev3.Locality{Zone: "z"},
			UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{
				UserAgentBuildVersion: &corev3.BuildVersion{}}},
	})
	return c
}

func (c *client) send(req *discoveryv3.DiscoveryRequest) {
	c.t.Helper()
	if err := c.stream.Send(req); err != nil {
		c.t.Fatal(err)
	}
}

// recv takes an answer and says its listeners by name.
func (c *client) recv() (*discoveryv3.DiscoveryResponse, map[string]*listenerv3.Listener) {
	c.t.Helper()
	resp, err := c.stream.Recv()
	if err != nil {
		c.t.Fatal(err)
	}
	listeners := make(map[string]*listenerv3.Listener)
	for _, r := range resp.GetResources() {
		l := new(listenerv3.Listener)
		if err := r.UnmarshalTo(l); err != nil {
			c.t.Fatal(err)
		}
		listeners[l.GetName()] = l
	}
	return resp, listeners
}

func (c *client) ack(resp *discoveryv3.DiscoveryResponse) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{
		TypeUrl: resp.GetTypeUrl(), VersionInfo: resp.GetVersionInfo(), ResponseNonce: resp.GetNonce()})
}

func (c *client) nack(resp *discoveryv3.DiscoveryResponse, accepted, why string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{TypeUrl: resp.GetTypeUrl(), VersionInfo: accepted,
		ResponseNonce: resp.GetNonce(),
		ErrorDetail:   &rpcstatus.Status{Code: 13, Message: why}})
}

func mesh(names ...string) controlplane.Config {
	var c controlplane.Config
	for i, n := range names {
		c.Services = append(c.Services, controlplane.Service{
			Name: n, Prefixes: []netip.Prefix{
				netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), 32)}, Port: 80, HTTP: true,
		})
	}
	return c
}

func set(t *testing.T, s *controlplane.Server, c controlplane.Config) controlplane.Push {
	t.Helper()
	p, err := s.Set(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPushAckAndReject(t *testing.T) {
	s := start(t, controlplane.Options{})
	push := set(t, s, mesh("a"))
	c := connect(t, s, insecure.NewCredentials())

	resp, listeners := c.recv()
	l := listeners[controlplane.OutboundListener]
	if l == nil || len(l.GetFilterChains()) != 1 ||
		l.GetListenerFilters()[0].GetName() != "envoy.filters.listener.original_dst" {
		t.Fatalf("listeners: %v", listeners)
	}
	c.ack(resp)
	if err := s.WaitAccepted(t.Context(), push); err != nil {
		t.Fatal(err)
	}
	nodes := s.Nodes()
	if len(nodes) != 1 || nodes[0].ID != "projects/1/networks/n/nodes/u" || nodes[0].Zone != "z" ||
		nodes[0].Authorization != "Bearer x" {
		t.Fatalf("nodes: %+v", nodes)
	}

	// The same again is no news: the next answer is the one with two chains.
	if p := set(t, s, mesh("a")); len(p.Changed) != 0 {
		t.Fatalf("an equal config changed %v", p.Changed)
	}
	set(t, s, mesh("a", "b"))
	refused, listeners := c.recv()
	if n := len(listeners[controlplane.OutboundListener].GetFilterChains()); n != 2 {
		t.Fatalf("%d chains, want 2", n)
	}

	// A refused version is not sent again until there is another...
	c.nack(refused, resp.GetVersionInfo(), "no")
	if err := s.WaitRejected(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	set(t, s, mesh("a", "b", "c"))
	third, _ := c.recv()
	if third.GetVersionInfo() == refused.GetVersionInfo() {
		t.Fatal("the refused version was sent again without a storm")
	}
	// ...but again and again in a storm.
	s.Storm(true)
	for range 5 {
		c.nack(third, resp.GetVersionInfo(), "no")
		third, _ = c.recv()
	}
	if got := s.Rejections(); len(got) < 5 || got[0].Details != "no" ||
		got[0].Version != refused.GetVersionInfo() {
		t.Fatalf("rejections: %+v", got)
	}
}

func TestMisbehaviour(t *testing.T) {
	ca, err := authority.New()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Certificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, controlplane.Options{Certificate: &cert})
	creds := credentials.NewClientTLSFromCert(ca.Pool(), "")
	set(t, s, mesh("a"))

	for _, refuse := range []struct {
		do   func()
		code codes.Code
		text string
	}{
		{func() { s.RefuseNotFound("n", "p") }, codes.NotFound, `Traffic Director configuration was not found for network "n" in project "p".`},
		{s.RefuseUnknownEntity, codes.NotFound, "Requested entity was not found."},
		{s.RefusePermission, codes.PermissionDenied, "Permission denied"},
		{func() { s.RefuseDisabled("7") }, codes.PermissionDenied, "has not been used in project 7 before or it is disabled"},
	} {
		s.Serve()
		before := connect(t, s, creds)
		before.recv()
		refuse.do()
		for name, c := range map[string]*client{
			"an open stream": before, "a new stream": connect(t, s, creds)} {
			_, err := c.stream.Recv()
			if st := status.Convert(err); st.Code() != refuse.code ||
				!strings.HasPrefix(st.Message(), refuse.text) && !strings.Contains(st.Message(), refuse.text) {
				t.Errorf("%s: %v, want %v %q", name, err, refuse.code, refuse.text)
			}
		}
	}

	s.Hang()
	hanging := connect(t, s, creds)
	answered := make(chan error, 1)
	go func() {
		_, err := hanging.stream.Recv()
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("a hanging control plane answered: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	s.Serve()
	if err := <-answered; err != nil {
		t.Fatal(err)
	}

	addr := s.Addr().String()
	s.GoAway()
	if conn, err := net.Dial("tcp", addr); err == nil {
		conn.Close()
		t.Fatal("the control plane is away but accepts")
	}
	if err := s.ComeBack(); err != nil {
		t.Fatal(err)
	}
	if s.Addr().String() != addr {
		t.Fatalf("came back on %s, was on %s", s.Addr(), addr)
	}
	connect(t, s, creds).recv()
}

func TestConfigIsRefusedInWords(t *testing.T) {
	s := start(t, controlplane.Options{})
	for want, c := range map[string]controlplane.Config{
		"name empty or used twice": mesh("a", "a"),
		"neither address nor port": {Services: []controlplane.Service{{Name: "x"}}},
		"inbound: port 0":          {Inbound: []controlplane.Inbound{{}}},
		"runtime layer":            {Runtime: map[string]any{"x": make(chan int)}},
	} {
		if _, err := s.Set(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Set: %v, want %q", err, want)
		}
	}
}
