package envoyadmin

import (
	"fmt"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"
)

// TestUsual: what is read without protojson is what protojson reads, and what has more in it, or is
// written in another way, is left to it.
func TestUsual(t *testing.T) {
	for _, tt := range []struct {
		text  string
		usual bool
	}{
		{`{}`, true},
		{`{"prefix_ranges":[{"address_prefix":"10.0.0.1","prefix_len":32},` +
			`{"address_prefix":"fd00::"}],"destination_port":80}`, true},
		{`{"prefix_ranges":[],"destination_port":null}`, true},
		{`{"destination_port":0}`, true},
		{`{"destination_port":70000}`, true}, // refused later
		{`{"destination_port":"80"}`, false},
		{`{"destinationPort":80}`, false},
		{`{"destination_port":8e1}`, false},
		{`{"destination_port":-1}`, false},
		{`{"destination_port":80,"destination_port":81}`, false},
		{`{"server_names":["a.test"],"destination_port":80}`, false},
		{`{"transport_protocol":"tls"}`, false},
		{`{"source_type":"EXTERNAL"}`, false},
		{`{"of a newer Envoy":1}`, false},
		{"{\"prefix_ranges\":[{\"address_prefix\":\"\xff\"}]}", false},
		{`[]`, false},
	} {
		var got, want listenerv3.FilterChainMatch
		m, ok := usual[usualMatch]([]byte(tt.text))
		if ok != tt.usual {
			t.Errorf("%s: usual is %v", tt.text, ok)
		}
		if m.into(&got); ok {
			err := decode.Unmarshal([]byte(tt.text), &want)
			if err != nil || !proto.Equal(&got, &want) {
				t.Errorf("%s: %v, want %v, %v", tt.text, &got, &want, err)
			}
		}
	}
	socket := func(more string) string {
		return `{"socket_address":{"address":"::","port_value":15001` + more + `}}`
	}
	for _, tt := range []struct {
		text  string
		usual bool
	}{
		{`{}`, true},
		{fmt.Sprintf(`{"address":%s,"additional_addresses":[{"address":%s},{"address":{}}],`+
			`"use_original_dst":true,"bind_to_port":false,"traffic_direction":"INBOUND"}`,
			socket(""), socket("")), true},
		{`{"address":` + socket("") + `,"use_original_dst":false,"bind_to_port":null}`, true},
		{`{"address":` + socket(`,"ipv4_compat":true`) + `}`, true},
		{`{"address":` + socket(`,"protocol":"UDP"`) + `}`, false},
		{`{"address":{"pipe":{"path":"/x"}}}`, false},
		{`{"traffic_direction":"SIDEWAYS"}`, false},
		{`{"traffic_direction":1}`, false},
		{`{"deprecated_v1":{"bind_to_port":false}}`, false},
	} {
		got, want := &listenerv3.Listener{}, &listenerv3.Listener{}
		l, ok := usual[usualListener]([]byte(tt.text))
		if ok != tt.usual {
			t.Errorf("%s: usual is %v", tt.text, ok)
		}
		if l.into(got); ok {
			err := decode.Unmarshal([]byte(tt.text), want)
			if got.GetAddress().GetAddress() == nil {
				got.Address, want.Address = nil, nil // {} and none are the same
			}
			if err != nil || !proto.Equal(got, want) {
				t.Errorf("%s: %v, want %v, %v", tt.text, got, want, err)
			}
		}
	}
}
