package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// startedWith is an Envoy that was started with this node, and asks this control plane.
func startedWith(id string, metadata map[string]string, target string) envoywatch.View {
	node := envoyadmin.Node{ID: id, Metadata: metadata}
	v := envoywatch.View{State: "LIVE"}
	v.Info.Node, v.Info.Config = node, "/etc/envoy.json"
	v.Started = &envoyadmin.Bootstrap{Node: node}
	if target != "" {
		v.Started.Targets = []envoyadmin.Target{{Address: target}}
	}
	return v
}

// TestIdentity: how Envoy presents itself to Traffic Director, and how it should.
func TestIdentity(t *testing.T) {
	const director, other = "trafficdirector.googleapis.com:443", "10.0.0.9:18000"
	type meta = map[string]string
	vm := symptom.VM{ProjectNumber: "123", Network: "default", NetworkProject: "123"}
	shared := symptom.VM{ProjectNumber: "123", Network: "shared", NetworkProject: "456"}
	names := meta{networkKey: "default", projectKey: "123"}
	for _, tt := range []struct {
		name            string
		vm              symptom.VM
		config          attribute.Config
		envoy           envoywatch.View
		want, presented *symptom.Node // without the id
	}{
		{"API v3's form", vm, attribute.Config{},
			startedWith("projects/123/networks/default/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "123", Network: "default"},
			&symptom.Node{ProjectNumber: "123", Network: "default"}},
		{"the metadata's form, of a control plane by another name", vm, attribute.Config{},
			startedWith("b42f~10.0.0.2", names, other),
			&symptom.Node{ProjectNumber: "123", Network: "default"},
			&symptom.Node{ProjectNumber: "123", Network: "default"}},
		{"the id counts", vm, attribute.Config{},
			startedWith("projects/9/networks/old/nodes/x", names, director),
			&symptom.Node{ProjectNumber: "123", Network: "default"},
			&symptom.Node{ProjectNumber: "9", Network: "old"}},
		{"neither", vm, attribute.Config{}, startedWith("me", nil, director),
			&symptom.Node{ProjectNumber: "123", Network: "default"}, &symptom.Node{}},
		{"another control plane knows no such names", vm, attribute.Config{},
			startedWith("projects/9/networks/old/nodes/x", meta{"app": "shop"}, other), nil, nil},
		{"nor one that is not known yet", vm, attribute.Config{}, envoywatch.View{State: "LIVE"}, nil, nil},
		{"the VM is not known yet", symptom.VM{}, attribute.Config{},
			startedWith("me", names, director), nil, nil},
		{"the attribute names both", vm, attribute.Config{Network: "n", ProjectNumber: "456"},
			startedWith("projects/456/networks/n/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "456", Network: "n"},
			&symptom.Node{ProjectNumber: "456", Network: "n"}},
		{"its mesh goes before its network", vm, attribute.Config{Network: "n", Mesh: "m"},
			startedWith("projects/123/networks/n/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "123", Network: "mesh:m"},
			&symptom.Node{ProjectNumber: "123", Network: "n"}},
		{"its scope, too", vm, attribute.Config{Scope: "s"},
			startedWith("projects/123/networks/mesh:s/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "123", Network: "scope:s"},
			&symptom.Node{ProjectNumber: "123", Network: "mesh:s"}},
		{"a mesh that only Envoy names", vm, attribute.Config{},
			startedWith("projects/123/networks/mesh:m/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "123", Network: "mesh:m"},
			&symptom.Node{ProjectNumber: "123", Network: "mesh:m"}},
		{"the host project of a shared VPC", shared, attribute.Config{},
			startedWith("projects/456/networks/shared/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "456", Network: "shared"},
			&symptom.Node{ProjectNumber: "456", Network: "shared"}},
		{"its service project", shared, attribute.Config{},
			startedWith("projects/123/networks/shared/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "123", Network: "shared"},
			&symptom.Node{ProjectNumber: "123", Network: "shared"}},
		{"unless the attribute says which", shared, attribute.Config{ProjectNumber: "123"},
			startedWith("projects/456/networks/shared/nodes/x", nil, director),
			&symptom.Node{ProjectNumber: "123", Network: "shared"},
			&symptom.Node{ProjectNumber: "456", Network: "shared"}},
	} {
		seen := Observation{Now: testStart, Envoy: tt.envoy, Self: Self{VM: tt.vm},
			Attribute: attributeInForce{Known: true, Config: tt.config}}
		if tt.presented != nil {
			tt.presented.ID = tt.envoy.Info.Node.ID
		}
		f := seen.Facts(Want{}, nil)
		if diff := cmp.Diff([]*symptom.Node{tt.want, tt.presented},
			[]*symptom.Node{f.Node, f.Presented}); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		if f.Configured != nil || f.Running != nil {
			t.Errorf("%s: bootstrap has written nothing, and it is %v", tt.name, f.Configured)
		}
	}
}

// TestSettled: nothing is said of an Envoy that is just being changed.
func TestSettled(t *testing.T) {
	text := []byte("{}")
	done := progress.State{Status: progress.Finished, AttributeSum: progress.Sum("{}"),
		Time: testStart.Add(-time.Hour),
		Envoy: &progress.EnvoyConfig{File: "f", Node: "projects/123/networks/default/nodes/x",
			Targets: []string{"td:443"}}}
	for _, tt := range []struct {
		name           string
		change         func(*Observation)
		whose, whereto bool // are compared
	}{
		{"all is known", func(*Observation) {}, true, true},
		{"Envoy is down", func(o *Observation) { o.Envoy.Err = envoyadmin.ErrRefused }, false, false},
		{"bootstrap is under way", func(o *Observation) { o.Bootstrap.Status = progress.InProgress },
			false, false},
		{"it has only just finished", func(o *Observation) {
			o.Bootstrap.Time = o.Now.Add(time.Second - settleTime)
		}, false, false},
		{"it failed", func(o *Observation) { o.Bootstrap.Status = progress.Failed }, true, false},
		{"there is none", func(o *Observation) { o.Bootstrap = progress.State{} }, true, false},
		{"an earlier version's", func(o *Observation) { o.Bootstrap.Envoy = nil }, true, false},
		{"the attribute is newer", func(o *Observation) { o.Attribute.text = []byte(`{"a": 1}`) },
			false, false},
		{"it is not known yet", func(o *Observation) { o.Attribute = attributeInForce{} }, false, true},
		{"the VM has none", func(o *Observation) {
			o.Attribute = attributeInForce{Err: errors.New("no attribute")}
		}, true, true},
		{"what Envoy was started with is not known yet", func(o *Observation) { o.Envoy.Started = nil },
			true, false},
	} {
		seen := Observation{Now: testStart, Bootstrap: done,
			Self:      Self{VM: symptom.VM{ProjectNumber: "123", Network: "default"}},
			Attribute: attributeInForce{Known: true, text: text},
			Envoy: startedWith("projects/123/networks/default/nodes/x",
				map[string]string{networkKey: "default"}, "td:443")}
		tt.change(&seen)
		f := seen.Facts(Want{}, nil)
		if (f.Node != nil) != tt.whose || (f.Presented != nil) != tt.whose {
			t.Errorf("%s: node %v, %v", tt.name, f.Node, f.Presented)
		}
		if (f.Configured != nil) != tt.whereto || (f.Running != nil) != tt.whereto {
			t.Errorf("%s: configured %v, running %v", tt.name, f.Configured, f.Running)
		}
		if tt.whereto && (!cmp.Equal(f.Running, &symptom.EnvoyConfig{NodeID: done.Envoy.Node,
			Targets: []string{"td:443"}, From: "/etc/envoy.json"}) ||
			!cmp.Equal(f.Configured, &symptom.EnvoyConfig{NodeID: done.Envoy.Node,
				Targets: []string{"td:443"}, From: "f"})) {
			t.Errorf("%s: configured %v, running %v", tt.name, f.Configured, f.Running)
		}
	}
}
