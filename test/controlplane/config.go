package controlplane

import (
	"errors"
	"fmt"
	"net/netip"
	"sort"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	dnstablev3 "github.com/envoyproxy/go-control-plane/envoy/data/dns/v3"
	fileaccesslogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	dnsfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/udp/dns_filter/v3"
	runtimev3 "github.com/envoyproxy/go-control-plane/envoy/service/runtime/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The names that Traffic Director gives its listeners and its runtime layer.
const (
	OutboundListener = "TRAFFICDIRECTOR_INTERCEPTION_LISTENER"
	InboundListener  = "TRAFFICDIRECTOR_INBOUND_INTERCEPTION_LISTENER"
	// the name is ours: Traffic Director's is not published
	DNSListener  = "DNS_INTERCEPTION_LISTENER"
	RuntimeLayer = "traffic_director_runtime"
)

// The ports used where a Config leaves them 0.
const (
	DefaultOutboundPort = 15001
	DefaultInboundPort  = 15006
	DefaultDNSPort      = 15053
)

// ServedByHeader is the response header by which an HTTP answer proves that it came through
// Envoy, and through which chain: its value is the service's name, or "inbound-PORT". (Envoy also
// puts `server: envoy`.)
const ServedByHeader = "x-served-by"

// IPv6 is how the interception listeners take IPv6.
type IPv6 int

const (
	IPv6Off        IPv6 = iota // 0.0.0.0 only
	IPv6Additional             // 0.0.0.0, and :: in additional_addresses
	IPv6DualStack              // :: with ipv4_compat
	IPv6Separate               // a second listener on ::, its name with the suffix "_V6"
)

// Config is what the mesh looks like for every node. The zero value is a mesh without a listener.
type Config struct {
	Services []Service
	Inbound  []Inbound
	DNS      *DNS

	OutboundPort uint16 // 0: 15001
	InboundPort  uint16 // 0: 15006
	IPv6         IPv6
	TLSInspector bool // a tls_inspector in the outbound listener, as Traffic Director sends
	// Passthrough gives the outbound listener a default chain that sends what no service takes to
	// where it was going (ORIGINAL_DST), as intercept-all-outbound needs. Without it, Envoy
	// closes such connections.
	Passthrough bool
	// AccessLog is a file that both listeners log to, one line a connection or request; empty: none. A
	// path that Envoy's user cannot open makes Envoy refuse the listener.
	AccessLog string
	// Runtime is what the runtime layer `traffic_director_runtime` answers; it answers in any case.
	Runtime map[string]any

	// Listeners, Clusters and Routes are sent as they are besides the compiled ones: other shapes,
	// refused listeners, Istio's way.
	Listeners []*listenerv3.Listener
	Clusters  []*clusterv3.Cluster
	Routes    []*routev3.RouteConfiguration
	// Edit, when set, sees every compiled listener before it is sent and may change it.
	Edit func(*listenerv3.Listener)
}

// Service is one forwarding rule: a filter chain in the outbound listener, a cluster, and, for
// HTTP, a route that comes by RDS.
type Service struct {
	Name     string
	Prefixes []netip.Prefix // the VIPs; none: address-less, the chain matches the port alone
	Port     uint16         // 0: every port
	HTTP     bool           // else a TCP proxy
	// Endpoints may be none: Envoy then answers HTTP with 503 and closes TCP.
	Endpoints []netip.AddrPort
	// Unhealthy are endpoints too, which the control plane says are unhealthy. When they are most,
	// Envoy panics: it uses them all the same.
	Unhealthy []netip.AddrPort
	// Cluster, when set, is the cluster's name; services of the same Cluster share the first one's
	// endpoints. 10,000 clusters of their own cost Envoy seconds.
	Cluster string
}

// VIPs makes full-length prefixes of addresses; it panics on what is no address, as it
// is meant for constants.
func VIPs(addrs ...string) []netip.Prefix {
	prefixes := make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		if strings.Contains(a, "/") {
			prefixes = append(prefixes, netip.MustParsePrefix(a))
			continue
		}
		addr := netip.MustParseAddr(a)
		prefixes = append(prefixes, netip.PrefixFrom(addr, addr.BitLen()))
	}
	return prefixes
}

// Inbound is a serving port of the VM: a filter chain in the inbound listener that matches
// the VM's own address.
type Inbound struct {
	Addr   netip.Addr // the VM's own; the zero Addr: any
	Port   uint16
	HTTP   bool
	Target netip.AddrPort // where the application listens; the zero value: 127.0.0.1:Port
}

// DNS is a listener for --intercept-dns. Envoy's DNS filter is UDP only.
type DNS struct {
	Port  uint16 // 0: 15053
	Names map[string][]netip.Addr
	IPv6  bool // listens on [::] beside 0.0.0.0
	// TCPUpstream, when valid, adds a TCP listener on the same port that proxies to this resolver.
	TCPUpstream netip.AddrPort
}

// RefusedListener is a listener that Envoy refuses with `unable to open file 'PATH': Permission
// denied` (or another errno): its access log is a file that Envoy's user cannot open.
func RefusedListener(name string, port uint16, path string) *listenerv3.Listener {
	b := builder{cfg: Config{AccessLog: path}}
	return b.listener(name, corev3.TrafficDirection_OUTBOUND, port, []*listenerv3.FilterChain{
		b.chain(Service{Name: "refused", Prefixes: VIPs("192.0.2.1"), Port: 80}, "cluster-refused"),
	})[0]
}

// resources compiles c, keyed by type URL.
func (c Config) resources() (map[string][]types.Resource, error) {
	b := builder{cfg: c, clustered: make(map[string]bool)}
	var outbound, inbound []*listenerv3.FilterChain
	names := make(map[string]bool)
	for _, s := range c.Services {
		if names[s.Name] || s.Name == "" {
			return nil, fmt.Errorf("service %q: name empty or used twice", s.Name)
		}
		names[s.Name] = true
		if len(s.Prefixes) == 0 && s.Port == 0 {
			return nil, fmt.Errorf("service %q: neither address nor port", s.Name)
		}
		cluster := s.Cluster
		if cluster == "" {
			cluster = "cluster-" + s.Name
		}
		b.cluster(cluster, s.Endpoints, s.Unhealthy)
		outbound = append(outbound, b.chain(s, cluster))
	}
	for _, in := range c.Inbound {
		if in.Port == 0 {
			return nil, errors.New("inbound: port 0")
		}
		target := in.Target
		if !target.IsValid() {
			target = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), in.Port)
		}
		s := Service{Name: fmt.Sprintf("inbound-%d", in.Port), Port: in.Port, HTTP: in.HTTP}
		if in.Addr.IsValid() {
			s.Prefixes = []netip.Prefix{netip.PrefixFrom(in.Addr, in.Addr.BitLen())}
			s.Name += "-" + in.Addr.String()
		}
		cluster := "cluster-" + s.Name
		b.cluster(cluster, []netip.AddrPort{target}, nil)
		inbound = append(inbound, b.chain(s, cluster))
	}
	if len(outbound) > 0 || c.Passthrough {
		b.listeners = append(b.listeners, b.listener(OutboundListener, corev3.TrafficDirection_OUTBOUND,
			or(c.OutboundPort, DefaultOutboundPort), outbound)...)
	}
	if len(inbound) > 0 {
		b.listeners = append(b.listeners, b.listener(InboundListener, corev3.TrafficDirection_INBOUND,
			or(c.InboundPort, DefaultInboundPort), inbound)...)
	}
	if c.Passthrough {
		b.clusters = append(b.clusters, &clusterv3.Cluster{
			Name:                 passthrough,
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
			LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
			ConnectTimeout:       durationpb.New(connectTimeout),
		})
	}
	if c.DNS != nil {
		b.dns(*c.DNS)
	}
	runtime, err := structpb.NewStruct(c.Runtime)
	if err != nil {
		return nil, fmt.Errorf("runtime layer: %w", err)
	}
	if c.Edit != nil {
		for _, l := range b.listeners {
			c.Edit(l)
		}
	}
	if b.err != nil {
		return nil, b.err
	}
	return map[string][]types.Resource{
		resourcev3.ListenerType: resources(append(b.listeners, c.Listeners...)),
		resourcev3.ClusterType:  resources(append(b.clusters, c.Clusters...)),
		resourcev3.RouteType:    resources(append(b.routes, c.Routes...)),
		resourcev3.RuntimeType:  {&runtimev3.Runtime{Name: RuntimeLayer, Layer: runtime}},
	}, nil
}

func resources[T types.Resource](in []T) []types.Resource {
	out := make([]types.Resource, len(in))
	for i, r := range in {
		out[i] = r
	}
	return out
}

func or(port, fallback uint16) uint16 {
	if port == 0 {
		return fallback
	}
	return port
}

const passthrough = "passthrough"

// builder gathers the resources of one Config. The first error stays in err.
type builder struct {
	cfg       Config
	listeners []*listenerv3.Listener
	clusters  []*clusterv3.Cluster
	clustered map[string]bool // names in clusters
	routes    []*routev3.RouteConfiguration
	err       error
}

// any packs m. Traffic Director packs with deterministic bytes; so do we, so that equal
// configs are equal resources.
func (b *builder) any(m proto.Message) *anypb.Any {
	a := new(anypb.Any)
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil &&
		b.err == nil {
		b.err = fmt.Errorf("pack %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return a
}

func (b *builder) cluster(name string, healthy, unhealthy []netip.AddrPort) {
	if b.clustered[name] {
		return
	}
	b.clustered[name] = true
	locality := &endpointv3.LocalityLbEndpoints{}
	add := func(endpoints []netip.AddrPort, health corev3.HealthStatus) {
		for _, e := range endpoints {
			locality.LbEndpoints = append(locality.LbEndpoints, &endpointv3.LbEndpoint{
				HealthStatus: health,
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
					Endpoint: &endpointv3.Endpoint{Address: address(e.Addr(), e.Port(), corev3.SocketAddress_TCP)},
				},
			})
		}
	}
	add(healthy, corev3.HealthStatus_UNKNOWN) // which counts as healthy
	add(unhealthy, corev3.HealthStatus_UNHEALTHY)
	b.clusters = append(b.clusters, &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{locality}},
	})
}

// chain is s's filter chain; for HTTP it also adds the route that the chain asks for by RDS.
func (b *builder) chain(s Service, cluster string) *listenerv3.FilterChain {
	match := &listenerv3.FilterChainMatch{}
	for _, p := range s.Prefixes {
		match.PrefixRanges = append(match.PrefixRanges, &corev3.CidrRange{
			AddressPrefix: p.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(p.Bits())),
		})
	}
	if s.Port != 0 {
		match.DestinationPort = wrapperspb.UInt32(uint32(s.Port))
	}
	chain := &listenerv3.FilterChain{Name: s.Name, FilterChainMatch: match}
	if s.HTTP {
		chain.Filters = []*listenerv3.Filter{b.http(s.Name, cluster)}
	} else {
		chain.Filters = []*listenerv3.Filter{b.tcp(s.Name, cluster)}
	}
	return chain
}

func (b *builder) tcp(name, cluster string) *listenerv3.Filter {
	return &listenerv3.Filter{
		Name: "envoy.filters.network.tcp_proxy",
		ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: b.any(&tcpproxyv3.TcpProxy{
			StatPrefix:       name,
			ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: cluster},
			AccessLog:        b.accessLog(),
		})},
	}
}

func (b *builder) http(name, cluster string) *listenerv3.Filter {
	route := "route-" + name
	b.routes = append(b.routes, &routev3.RouteConfiguration{
		Name: route,
		VirtualHosts: []*routev3.VirtualHost{{
			Name:    name,
			Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_Route{
					Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}}},
			}},
		}},
		ResponseHeadersToAdd: []*corev3.HeaderValueOption{{
			Header:       &corev3.HeaderValue{Key: ServedByHeader, Value: name},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}},
	})
	return &listenerv3.Filter{
		Name: "envoy.filters.network.http_connection_manager",
		ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: b.any(&hcmv3.HttpConnectionManager{
			StatPrefix: name,
			RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
				RouteConfigName: route,
				ConfigSource: &corev3.ConfigSource{
					ResourceApiVersion:    corev3.ApiVersion_V3,
					ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
				},
			}},
			HttpFilters: []*hcmv3.HttpFilter{{
				Name:       "envoy.filters.http.router",
				ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: b.any(&routerv3.Router{})},
			}},
			AccessLog: b.accessLog(),
		})},
	}
}

func (b *builder) accessLog() []*accesslogv3.AccessLog {
	if b.cfg.AccessLog == "" {
		return nil
	}
	return []*accesslogv3.AccessLog{{
		Name: "envoy.access_loggers.file",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: b.any(&fileaccesslogv3.FileAccessLog{
			Path: b.cfg.AccessLog,
			AccessLogFormat: &fileaccesslogv3.FileAccessLog_LogFormat{
				LogFormat: &corev3.SubstitutionFormatString{
					Format: &corev3.SubstitutionFormatString_TextFormatSource{
						TextFormatSource: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{
							InlineString: "[%START_TIME%] %FILTER_CHAIN_NAME% %DOWNSTREAM_REMOTE_ADDRESS% -> " +
								"%DOWNSTREAM_LOCAL_ADDRESS% -> %UPSTREAM_HOST% %RESPONSE_CODE% %RESPONSE_FLAGS%\n",
						}}},
				}},
		})},
	}}
}

// listener is one interception listener, or two for IPv6Separate.
func (b *builder) listener(name string, direction corev3.TrafficDirection, port uint16,
	chains []*listenerv3.FilterChain) []*listenerv3.Listener {
	make1 := func(name string, addr netip.Addr) *listenerv3.Listener {
		l := &listenerv3.Listener{
			Name:             name,
			Address:          address(addr, port, corev3.SocketAddress_TCP),
			TrafficDirection: direction,
			FilterChains:     chains,
			ListenerFilters: []*listenerv3.ListenerFilter{{
				Name: "envoy.filters.listener.original_dst",
				ConfigType: &listenerv3.ListenerFilter_TypedConfig{
					TypedConfig: b.any(&originaldstv3.OriginalDst{})},
			}},
		}
		if direction == corev3.TrafficDirection_OUTBOUND {
			if b.cfg.TLSInspector {
				l.ListenerFilters = append(l.ListenerFilters, &listenerv3.ListenerFilter{
					Name: "envoy.filters.listener.tls_inspector",
					ConfigType: &listenerv3.ListenerFilter_TypedConfig{
						TypedConfig: b.any(&tlsinspectorv3.TlsInspector{})},
				})
			}
			if b.cfg.Passthrough {
				l.DefaultFilterChain = &listenerv3.FilterChain{
					Name: passthrough, Filters: []*listenerv3.Filter{b.tcp(passthrough, passthrough)}}
			}
		}
		return l
	}
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	switch b.cfg.IPv6 {
	case IPv6Additional:
		l := make1(name, any4)
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{
			{Address: address(any6, port, corev3.SocketAddress_TCP)}}
		return []*listenerv3.Listener{l}
	case IPv6DualStack:
		l := make1(name, any6)
		l.Address.GetSocketAddress().Ipv4Compat = true
		return []*listenerv3.Listener{l}
	case IPv6Separate:
		return []*listenerv3.Listener{make1(name, any4), make1(name+"_V6", any6)}
	default:
		return []*listenerv3.Listener{make1(name, any4)}
	}
}

func (b *builder) dns(d DNS) {
	port := or(d.Port, DefaultDNSPort)
	type bound struct {
		name string
		addr netip.Addr
	}
	at := []bound{{DNSListener, netip.IPv4Unspecified()}}
	if d.IPv6 {
		at = append(at, bound{DNSListener + "_V6", netip.IPv6Unspecified()})
	}
	table := &dnstablev3.DnsTable{}
	names := make([]string, 0, len(d.Names))
	for name := range d.Names {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		list := &dnstablev3.DnsTable_AddressList{}
		for _, a := range d.Names[name] {
			list.Address = append(list.Address, a.String())
		}
		table.VirtualDomains = append(table.VirtualDomains, &dnstablev3.DnsTable_DnsVirtualDomain{
			Name: name,
			Endpoint: &dnstablev3.DnsTable_DnsEndpoint{
				EndpointConfig: &dnstablev3.DnsTable_DnsEndpoint_AddressList{AddressList: list}},
		})
	}
	for _, on := range at {
		b.listeners = append(b.listeners, &listenerv3.Listener{
			Name:             on.name,
			Address:          address(on.addr, port, corev3.SocketAddress_UDP),
			TrafficDirection: corev3.TrafficDirection_OUTBOUND,
			UdpListenerConfig: &listenerv3.UdpListenerConfig{
				DownstreamSocketConfig: &corev3.UdpSocketConfig{MaxRxDatagramSize: wrapperspb.UInt64(9000)},
			},
			ListenerFilters: []*listenerv3.ListenerFilter{{
				Name: "envoy.filters.udp.dns_filter",
				ConfigType: &listenerv3.ListenerFilter_TypedConfig{
					TypedConfig: b.any(&dnsfilterv3.DnsFilterConfig{
						StatPrefix: "dns",
						ServerConfig: &dnsfilterv3.DnsFilterConfig_ServerContextConfig{
							ConfigSource: &dnsfilterv3.DnsFilterConfig_ServerContextConfig_InlineDnsTable{
								InlineDnsTable: table},
						},
					})},
			}},
		})
	}
	if !d.TCPUpstream.IsValid() {
		return
	}
	const upstream = "dns-upstream"
	b.cluster(upstream, []netip.AddrPort{d.TCPUpstream}, nil)
	for _, on := range at {
		b.listeners = append(b.listeners, &listenerv3.Listener{
			Name:             on.name + "_TCP",
			Address:          address(on.addr, port, corev3.SocketAddress_TCP),
			TrafficDirection: corev3.TrafficDirection_OUTBOUND,
			FilterChains: []*listenerv3.FilterChain{
				{Name: upstream, Filters: []*listenerv3.Filter{b.tcp(upstream, upstream)}}},
		})
	}
}

func address(addr netip.Addr, port uint16, protocol corev3.SocketAddress_Protocol) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Protocol:      protocol,
		Address:       addr.String(),
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}
