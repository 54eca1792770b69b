package envoyadmin

import (
	"errors"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"github.com/go-json-experiment/json"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// What nearly all listeners and chains have is read without protojson: it takes half as long, and
// protojson keeps descriptors of all that a listener could have, which are 0.7 MB. What holds
// anything else, or holds it in another form, is left to protojson as a whole.

// usual reads what holds nothing but the fields of T, each in the form in which Envoy writes it.
func usual[T any](raw []byte) (v T, ok bool) {
	return v, json.Unmarshal(raw, &v, json.RejectUnknownMembers(true)) == nil
}

// usualMatch is a config.listener.v3.FilterChainMatch of a destination.
type usualMatch struct {
	Ranges []struct {
		Address string  `json:"address_prefix"`
		Length  *uint32 `json:"prefix_len"`
	} `json:"prefix_ranges"`
	Port *uint32 `json:"destination_port"`
}

func (u usualMatch) into(m *listenerv3.FilterChainMatch) {
	for _, r := range u.Ranges {
		m.PrefixRanges = append(m.PrefixRanges,
			&corev3.CidrRange{AddressPrefix: r.Address, PrefixLen: wrapped(r.Length)})
	}
	m.DestinationPort = wrapped(u.Port)
}

// usualAddress is a config.core.v3.Address of a TCP socket.
type usualAddress struct {
	Socket *struct {
		Address string `json:"address"`
		Port    uint32 `json:"port_value"`
		Compat  bool   `json:"ipv4_compat"`
	} `json:"socket_address"`
}

func (u usualAddress) address() *corev3.Address {
	if u.Socket == nil {
		return &corev3.Address{}
	}
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: u.Socket.Address, Ipv4Compat: u.Socket.Compat,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: u.Socket.Port}}}}
}

// usualListener are the small fields of a config.listener.v3.Listener.
type usualListener struct {
	Address    usualAddress `json:"address"`
	Additional []struct {
		Address usualAddress `json:"address"`
	} `json:"additional_addresses"`
	BindToPort     *bool     `json:"bind_to_port"`
	UseOriginalDst *bool     `json:"use_original_dst"`
	Direction      direction `json:"traffic_direction"`
}

func (u usualListener) into(l *listenerv3.Listener) {
	l.Address = u.Address.address()
	for _, a := range u.Additional {
		l.AdditionalAddresses = append(l.AdditionalAddresses,
			&listenerv3.AdditionalAddress{Address: a.Address.address()})
	}
	if u.BindToPort != nil {
		l.BindToPort = wrapperspb.Bool(*u.BindToPort)
	}
	if u.UseOriginalDst != nil {
		l.UseOriginalDst = wrapperspb.Bool(*u.UseOriginalDst)
	}
	l.TrafficDirection = corev3.TrafficDirection(u.Direction)
}

// direction is a config.core.v3.TrafficDirection by its name.
type direction corev3.TrafficDirection

func (d *direction) UnmarshalText(text []byte) error {
	value, ok := corev3.TrafficDirection_value[string(text)]
	if !ok {
		return errors.New("no direction of traffic")
	}
	*d = direction(value)
	return nil
}

func wrapped(n *uint32) *wrapperspb.UInt32Value {
	if n == nil {
		return nil
	}
	return wrapperspb.UInt32(*n)
}
