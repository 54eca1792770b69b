package envoyadmin

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// Listener is one listener that Envoy runs, as far as interception asks.
type Listener struct {
	Name       string
	Static     bool // of Envoy's own configuration, not from the control plane
	Direction  corev3.TrafficDirection
	Addresses  []netip.AddrPort // address, then additional_addresses
	Ipv4Compat bool             // an IPv6 address takes IPv4 connections too
	// has a socket: neither bind_to_port nor deprecated_v1.bind_to_port is false
	Bound bool
	UDP   bool
	DNS   bool // answers DNS: it has Envoy's DNS filter
	// looks up where a redirected connection wanted to go: original_dst listener
	// filter, or use_original_dst
	OriginalDst bool
	// HandsOff: by use_original_dst it hands a connection to the listener of the address that was
	// wanted, bound or not, where there is one
	HandsOff bool
	FCDS     bool // gets filter chains by a discovery of their own, which no dump shows

	// Chains are what traffic is matched against. With a filter_chain_matcher a chain is listed once
	// per way that leads to it, with the addresses and port of that way.
	Chains       []FilterChain
	DefaultChain *FilterChain
	ByMatcher    bool // a filter_chain_matcher chooses

	Version     string // version_info: stale after an update of filter chains only
	LastUpdated time.Time
}

// FilterChain is what Envoy does with connections that match.
type FilterChain struct {
	Name     string
	Prefixes []netip.Prefix // destinations; none: any

	// Small fields are side by side: there are 10,000 chains, and 16 bytes between them in each.
	Port uint16 // destination; 0: any
	// it takes only some of these connections: by source, or by what a filter_chain_matcher looks at
	OtherConditions bool
	HTTP, TCP       bool // has an HTTP connection manager, a TCP proxy
	TLS             bool // ends TLS (has a transport socket)
	// a listener filter waits for the client's first bytes to see whether they are TLS
	TLSInspected bool

	// What few chains want, which are 64 bytes. nil: nothing of it. In JSON they are the chain's own.
	Rare *RareMatch `json:",embed"`

	RouteConfig string
	Cluster     string // of a TCP proxy; several of weighted clusters, parted by commas
}

// RareMatch is what a chain wants beside a destination.
type RareMatch struct {
	ServerNames          []string // of TLS
	TransportProtocol    string   // "tls", "raw_buffer"; empty: any
	ApplicationProtocols []string
	Source               *SourceMatch // the conditions by source; nil: none that are known
}

// rare is what the chain wants beside a destination, be it nothing.
func (c *FilterChain) rare() RareMatch {
	if c.Rare == nil {
		return RareMatch{}
	}
	return *c.Rare
}

// SourceMatch is what a chain wants of where a connection comes from.
type SourceMatch struct {
	Direct          []netip.Prefix // of the connection itself, whatever a proxy protocol says
	Prefixes        []netip.Prefix
	Ports           []uint16
	Local, External bool // from this machine, from elsewhere
}

// decode reads the JSON of a pruned part into a type of go-control-plane. Fields of
// newer Envoys are dropped.
var decode = protojson.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: maxDepth,
	Resolver: lenient{}}

// lenient finds a type for each Any, since one that is not linked in would fail the parse of all
// around it, DiscardUnknown or not. What it falls back to is an ordinary message; protojson treats
// the well-known ones, emptypb.Empty among them, in a way of their own.
type lenient struct{}

func (lenient) FindMessageByURL(url string) (protoreflect.MessageType, error) {
	if known, err := protoregistry.GlobalTypes.FindMessageByURL(url); err == nil {
		return known, nil
	}
	return (&corev3.AggregatedConfigSource{}).ProtoReflect().Type(), nil
}

func (lenient) FindMessageByName(name protoreflect.FullName) (protoreflect.MessageType, error) {
	return protoregistry.GlobalTypes.FindMessageByName(name)
}

func (lenient) FindExtensionByName(protoreflect.FullName) (protoreflect.ExtensionType, error) {
	return nil, protoregistry.NotFound
}

func (lenient) FindExtensionByNumber(protoreflect.FullName,
	protoreflect.FieldNumber) (protoreflect.ExtensionType, error) {
	return nil, protoregistry.NotFound
}

// listener reads a config.listener.v3.Listener, or an api.v2.Listener, which has the same names.
// What is not understood in it is returned as reasons; err is only of the stream.
func (r *reader) listener() (Listener, []string, error) {
	p := partial{Listener: Listener{Bound: true}, small: []byte{'{'}}
	err := r.object(func(name string) error { return p.field(r, name) })
	if err != nil && !isShape(err) {
		return p.Listener, nil, err
	}
	if err != nil {
		p.note("%v", err)
	}
	p.finish()
	if p.more > 0 {
		p.reasons = append(p.reasons, fmt.Sprintf("and %d more", p.more))
	}
	return p.Listener, p.reasons, nil
}

// partial is a listener that is being read. Its fields come in any order, and some
// say what others mean.
type partial struct {
	Listener
	small   []byte // the fields that are left to protojson, as an object without its end
	matcher []byte // filter_chain_matcher
	// Of the kinds without a socket of their own.
	internal, api bool
	tlsInspector  bool

	// full are the chains that are read, but for those in Chains. A slice that grows by append would
	// be copied again and again, and end up to a quarter too long: at 10,000 chains 8 MB of garbage.
	full [][]FilterChain

	reasons []string // what was not understood
	more    int      // reasons past maxReasons
}

// chunk is how many chains are collected before they are put aside.
const chunk = 512

func (p *partial) add(chain FilterChain) {
	if len(p.Chains) == chunk {
		p.full, p.Chains = append(p.full, p.Chains), make([]FilterChain, 0, chunk)
	}
	p.Chains = append(p.Chains, chain)
}

func (p *partial) note(format string, args ...any) {
	if len(p.reasons) < maxReasons {
		p.reasons = append(p.reasons, fmt.Sprintf(format, args...))
	} else {
		p.more++
	}
}

// field reads the value of one field.
func (p *partial) field(r *reader, name string) error {
	switch name {
	case "@type":
		var url string
		if err := r.textInto(&url); err != nil {
			return err
		}
		if !strings.HasSuffix(url, "/envoy.config.listener.v3.Listener") &&
			!strings.HasSuffix(url, "/envoy.api.v2.Listener") {
			p.note("type %q is no listener", url)
		}
		return nil
	case "name":
		return r.textInto(&p.Name)
	case "address", "additional_addresses", "bind_to_port", "deprecated_v1", "use_original_dst",
		"traffic_direction":
		value, err := r.raw(maxPrefixes)
		if err != nil {
			return err
		}
		if len(p.small) > 1 {
			p.small = append(p.small, ',')
		}
		p.small = append(append(append(append(p.small, '"'), name...), `":`...), value...)
		return nil
	case "filter_chain_matcher":
		value, err := r.raw(maxMatcher)
		p.matcher = slices.Clone(value)
		return err
	case "fcds_config":
		p.FCDS = true
	case "internal_listener":
		p.internal = true
	case "api_listener":
		p.api = true
	case "listener_filters":
		return r.array(func() error {
			f, err := r.filter()
			switch {
			case f.is("OriginalDst", "envoy.listener.original_dst", "envoy.filters.listener.original_dst"):
				p.OriginalDst = true
			case f.is("TlsInspector", "envoy.listener.tls_inspector",
				"envoy.filters.listener.tls_inspector"):
				p.tlsInspector = true
			case f.is("DnsFilterConfig", "envoy.filters.udp.dns_filter"):
				p.DNS = true
			}
			return err
		})
	case "filter_chains":
		return r.array(func() error {
			chain, err := r.filterChain()
			if err == nil {
				p.add(chain)
			} else if isShape(err) {
				p.note("filter chain %q: %v", chain.Name, err)
				return nil
			}
			return err
		})
	case "default_filter_chain":
		chain, err := r.filterChain()
		if err == nil {
			p.DefaultChain = &chain
		} else if isShape(err) {
			p.note("default filter chain: %v", err)
			return nil
		}
		return err
	}
	return r.skip()
}

// finish sees to what could be understood only once all fields were read.
func (p *partial) finish() {
	if p.full != nil {
		p.Chains = slices.Concat(append(p.full, p.Chains)...)
		p.full = nil
	}
	p.small = append(p.small, '}')
	var parsed listenerv3.Listener
	if usual, ok := usual[usualListener](p.small); ok {
		usual.into(&parsed)
	} else if err := decode.Unmarshal(p.small, &parsed); err != nil {
		p.note("not understood: %s", plain(err))
		return
	}
	p.Direction = parsed.GetTrafficDirection()
	p.HandsOff = parsed.GetUseOriginalDst().GetValue()
	p.OriginalDst = p.OriginalDst || p.HandsOff
	//nolint:staticcheck // older control planes say it this way
	if bind := cmp.Or(parsed.GetBindToPort(), parsed.GetDeprecatedV1().GetBindToPort()); bind != nil {
		p.Bound = bind.GetValue()
	}
	switch {
	case p.internal:
		p.note("an internal listener has no socket")
	case p.api:
		p.note("an API listener has no socket")
	default:
		p.address(parsed.GetAddress(), p.note)
		for _, additional := range parsed.GetAdditionalAddresses() {
			p.address(additional.GetAddress(), p.note)
		}
	}
	if p.matcher != nil {
		p.ByMatcher = true
		if err := p.match(p.matcher, p.note); err != nil {
			p.note("filter_chain_matcher: %s", plain(err))
		}
	}
	for i := range p.Chains {
		p.Chains[i].TLSInspected = p.tlsInspector
	}
	if p.DefaultChain != nil {
		p.DefaultChain.TLSInspected = p.tlsInspector
	}
}

// plain is the text of an error of protojson, which varies its spaces so that nobody depends on it.
func plain(err error) string {
	return strings.ReplaceAll(err.Error(), "\u00a0", " ")
}

// address takes an address over, or says why not.
func (l *Listener) address(a *corev3.Address, note func(string, ...any)) {
	switch a := a.GetAddress().(type) {
	case *corev3.Address_SocketAddress:
		s := a.SocketAddress
		ip, err := netip.ParseAddr(s.GetAddress())
		switch {
		case err != nil:
			note("address %q is no IP address", s.GetAddress())
			return
		case s.GetNamedPort() != "" || s.GetPortValue() > 65535:
			note("address %s: a port from 0 to 65535 is needed", s.GetAddress())
			return
		}
		l.UDP = l.UDP || s.GetProtocol() == corev3.SocketAddress_UDP
		l.Ipv4Compat = l.Ipv4Compat || s.GetIpv4Compat()
		l.Addresses = append(l.Addresses, netip.AddrPortFrom(ip, uint16(s.GetPortValue())))
	case *corev3.Address_Pipe:
		note("pipe %q is no TCP socket", a.Pipe.GetPath())
	case *corev3.Address_EnvoyInternalAddress:
		note("an internal address has no socket")
	default:
		note("it has no address")
	}
}

// filterChain reads a config.listener.v3.FilterChain. A shape error says why it
// cannot be understood.
func (r *reader) filterChain() (chain FilterChain, err error) {
	err = r.object(func(name string) error {
		switch name {
		case "name":
			return r.textInto(&chain.Name)
		case "filter_chain_match":
			raw, err := r.raw(maxPrefixes)
			if err != nil {
				return err
			}
			return chain.match(raw)
		case "filters":
			return r.array(func() error {
				f, err := r.filter()
				switch {
				case f.is("HttpConnectionManager", "envoy.http_connection_manager",
					"envoy.filters.network.http_connection_manager"):
					chain.HTTP, chain.RouteConfig = true, f.route
				case f.is("TcpProxy", "envoy.tcp_proxy", "envoy.filters.network.tcp_proxy"):
					chain.TCP, chain.Cluster = true, f.cluster
				}
				return err
			})
		case "transport_socket", "tls_context":
			chain.TLS = true
		}
		return r.skip()
	})
	return chain, err
}

// match takes over a filter_chain_match.
func (c *FilterChain) match(raw []byte) error {
	var m listenerv3.FilterChainMatch
	if usual, ok := usual[usualMatch](raw); ok {
		usual.into(&m)
	} else if err := decode.Unmarshal(raw, &m); err != nil {
		return &shapeError{"filter_chain_match: " + plain(err)}
	}
	var err error
	if len(m.GetPrefixRanges()) > 0 {
		c.Prefixes = make([]netip.Prefix, 0, len(m.GetPrefixRanges()))
	}
	for _, r := range m.GetPrefixRanges() {
		var p netip.Prefix
		if p, err = prefix(r.GetAddressPrefix(), r.GetPrefixLen().GetValue()); err != nil {
			return err // all of it: with a destination less, the chain would seem to take any
		}
		c.Prefixes = append(c.Prefixes, p)
	}
	if p := m.GetDestinationPort().GetValue(); p > 65535 {
		return &shapeError{fmt.Sprintf("destination port %d", p)}
	} else {
		c.Port = uint16(p)
	}
	if len(m.GetServerNames())+len(m.GetApplicationProtocols()) > 0 ||
		m.GetTransportProtocol() != "" {
		c.Rare = &RareMatch{ServerNames: m.GetServerNames(),
			TransportProtocol:    m.GetTransportProtocol(),
			ApplicationProtocols: m.GetApplicationProtocols()}
	}
	c.OtherConditions = len(m.GetSourcePrefixRanges()) > 0 ||
		len(m.GetDirectSourcePrefixRanges()) > 0 || len(m.GetSourcePorts()) > 0 ||
		m.GetSourceType() != listenerv3.FilterChainMatch_ANY
	if c.OtherConditions {
		return c.source(&m)
	}
	return nil
}

// source takes over what a filter_chain_match wants of the source.
func (c *FilterChain) source(m *listenerv3.FilterChainMatch) error {
	source := SourceMatch{
		Local:    m.GetSourceType() == listenerv3.FilterChainMatch_SAME_IP_OR_LOOPBACK,
		External: m.GetSourceType() == listenerv3.FilterChainMatch_EXTERNAL,
	}
	for _, of := range []struct {
		ranges []*corev3.CidrRange
		into   *[]netip.Prefix
	}{
		{m.GetDirectSourcePrefixRanges(), &source.Direct},
		{m.GetSourcePrefixRanges(), &source.Prefixes},
	} {
		for _, r := range of.ranges {
			p, err := prefix(r.GetAddressPrefix(), r.GetPrefixLen().GetValue())
			if err != nil {
				return err
			}
			*of.into = append(*of.into, p)
		}
	}
	for _, port := range m.GetSourcePorts() {
		source.Ports = append(source.Ports, uint16(port)) // Envoy takes 1 to 65535 only
	}
	rare := c.rare()
	rare.Source = &source
	c.Rare = &rare
	return nil
}

// prefix makes a prefix as Envoy does: bits past the length are dropped, and a length past the
// address's own is cut.
func prefix(address string, length uint32) (netip.Prefix, error) {
	ip, err := netip.ParseAddr(address)
	if err != nil || ip.Zone() != "" || ip.Is4In6() {
		return netip.Prefix{}, &shapeError{fmt.Sprintf("%q is no plain IPv4 or IPv6 address", address)}
	}
	return netip.PrefixFrom(ip, int(min(length, uint32(ip.BitLen())))).Masked(), nil
}

// filter is what is looked at of a filter: its type, and where it sends traffic.
type filter struct {
	name, url      string
	route, cluster string
}

// is tells the type: by that of the configuration, or where there is none (before 1.17), by the
// filter's well-known name.
func (f filter) is(message string, names ...string) bool {
	if f.url != "" {
		return strings.HasSuffix(f.url, "."+message)
	}
	return slices.Contains(names, f.name)
}

// filter reads a network filter or a listener filter. Of the configuration it looks at few fields;
// the rest can be anything.
func (r *reader) filter() (f filter, err error) {
	ignore := func(err error) error {
		if isShape(err) {
			return nil // a field of the same name in another filter
		}
		return err
	}
	err = r.object(func(name string) error {
		switch name {
		case "name":
			return r.textInto(&f.name)
		case "typed_config", "config":
			return ignore(r.object(func(name string) error {
				switch name {
				case "@type":
					return r.textInto(&f.url)
				case "rds":
					return r.object(func(name string) error {
						if name == "route_config_name" {
							return r.textInto(&f.route)
						}
						return r.skip()
					})
				case "route_config":
					return r.nameOf(&f.route)
				case "cluster":
					return r.textInto(&f.cluster)
				case "weighted_clusters":
					return r.object(func(name string) error {
						if name != "clusters" {
							return r.skip()
						}
						var all []string
						err := r.array(func() error {
							var one string
							err := r.nameOf(&one)
							all = append(all, one)
							return err
						})
						f.cluster = strings.Join(all, ",")
						return err
					})
				}
				return r.skip()
			}))
		}
		return r.skip()
	})
	return f, err
}
