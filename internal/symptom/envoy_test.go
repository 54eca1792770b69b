package symptom

import (
	"errors"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// TestEnvoysWords holds what is made of Envoy's and the control plane's own words against sentences
// written by hand. The words are those that Envoy 1.40.0 logs or has in error_state.details, after
// internal/redaction; the control plane's are those of Traffic Director in Google's documents,
// which the test control plane repeats.
func TestEnvoysWords(t *testing.T) {
	rejected := func(details string) Envoy {
		return Envoy{State: "LIVE", Configured: true, Rejected: []envoyadmin.Rejected{
			{Name: "out", Details: details}}}
	}
	stream := func(code int, message string) Envoy {
		return Envoy{State: "LIVE", Configured: true,
			Stream: &Stream{Target: "td:443", Code: code, Message: message}}
	}
	probed := func(e Envoy) Envoy { // and it works
		e.Probed = true
		return e
	}
	trying := func(e Envoy) Envoy { e.Trying = true; return e }
	for _, test := range []struct {
		envoy Envoy
		id    ID
		want  string
	}{
		{rejected("Proto constraint validation failed (HttpConnectionManager.RouteConfig.VirtualHosts[0].Routes[0].RequestHeadersToAdd[0].AppendAction: value must be one of the defined enum values)"), ListenerRejected,
			"Envoy rejected listener out: Proto constraint validation failed (HttpConnectionManager.RouteConfig.VirtualHosts[0].Routes[0].RequestHeadersToAdd[0].AppendAction: value must be one of the defined enum values); services new in it are not intercepted; correct the configuration at the control plane"},
		{rejected("Incorrect configuration: [...]. Couldn't find valid command at position 14"), ListenerRejected,
			"Envoy rejected listener out: Incorrect configuration: [...]. Couldn't find valid command at position 14; services new in it are not intercepted; correct the configuration at the control plane"},
		{rejected("unable to open file '/var/log/envoy/access.log': Permission denied"), AccessLogUnwritable,
			"Envoy rejected listener out: it cannot write the access log /var/log/envoy/access.log (Permission denied); services new in it are not intercepted; make /var/log/envoy/access.log writable by envoy (`ls -ld` tells who owns it now), or choose another access-log path"},
		{stream(5, `Traffic Director configuration was not found for network "default" in project "123456789012".`), ConfigNotFound,
			`Cannot reach the Traffic Director API server: Traffic Director configuration was not found for network "default" in project "123456789012" (gRPC code 5); create a forwarding rule (INTERNAL_SELF_MANAGED) or a mesh for network "default" in project "123456789012", or correct the attribute`},
		{stream(5, "Requested entity was not found."), ConfigNotFound,
			"Cannot reach the Traffic Director API server: Requested entity was not found (gRPC code 5); check the mesh, scope or network name in the gce-service-proxy attribute"},
		{stream(7, "Traffic Director API has not been used in project 123456789012 before or it is disabled. Enable it by visiting https://console.developers.google.com/apis/api/trafficdirector.googleapis.com/overview then retry."), APINotEnabled,
			"Cannot reach the Traffic Director API server: the API is not enabled in project 123456789012; enable it: gcloud services enable trafficdirector.googleapis.com --project=123456789012"},
		{stream(5, `Cloud Service Mesh configuration was not found for network "default" in project "123456789012".`), ConfigNotFound,
			`Cannot reach the Traffic Director API server: Cloud Service Mesh configuration was not found for network "default" in project "123456789012" (gRPC code 5); create a forwarding rule (INTERNAL_SELF_MANAGED) or a mesh for network "default" in project "123456789012", or correct the attribute`},
		{stream(5, "Cloud Service Mesh configuration was not found."), ConfigNotFound,
			"Cannot reach the Traffic Director API server: Cloud Service Mesh configuration was not found (gRPC code 5); check the mesh, scope or network name in the gce-service-proxy attribute"},
		{stream(5, "Traffic Director configuration was not found."), ConfigNotFound,
			"Cannot reach the Traffic Director API server: Traffic Director configuration was not found (gRPC code 5); check the mesh, scope or network name in the gce-service-proxy attribute"},
		{stream(7, "Cloud Service Mesh API has not been used in project 123456789012 before or it is disabled. Enable it by visiting https://console.developers.google.com/apis/api/trafficdirector.googleapis.com/overview then retry."), APINotEnabled,
			"Cannot reach the Traffic Director API server: the API is not enabled in project 123456789012; enable it: gcloud services enable trafficdirector.googleapis.com --project=123456789012"},
		{stream(7, "Permission 'trafficdirector.networks.reportMetrics' denied on resource '//trafficdirector.googleapis.com/projects/123456789012' (or it may not exist)."), PermissionDenied,
			"Cannot reach the Traffic Director API server: Permission 'trafficdirector.networks.reportMetrics' denied on resource '//trafficdirector.googleapis.com/projects/123456789012' (or it may not exist) (gRPC code 7); grant roles/trafficdirector.client to the VM's service account"},
		{stream(8, "Quota exceeded."), ControlPlaneRefused,
			"Cannot reach the Traffic Director API server: Quota exceeded (gRPC code 8); see /var/log/envoy/envoy.err.log"},
		{stream(13, ""), ControlPlaneConnect,
			"Cannot reach the Traffic Director API server: Envoy's stream to td:443 ended with gRPC code 13 and no reason; a firewall may block TCP 443; see the warnings in /var/log/envoy/envoy.err.log"},
		{trying(stream(8, "Quota exceeded.")), ControlPlaneRefused,
			"Cannot reach the Traffic Director API server: Quota exceeded (gRPC code 8); see /var/log/envoy/envoy.err.log"},
		{trying(stream(13, "")), "", ""},
		{trying(stream(14, "upstream connect error or disconnect/reset before headers. reset reason: connection timeout")), "", ""},
		{trying(stream(13, "upstream_reset_after_response_started")), "", ""},
		{trying(Envoy{State: "LIVE", Configured: true, Apart: true}), "", ""},
		{Envoy{State: "LIVE", Configured: true, Apart: true}, ControlPlaneConnect,
			"Cannot reach the Traffic Director API server: Envoy has no stream to it and its log gives no reason; see the warnings in /var/log/envoy/envoy.err.log"},
		{probed(stream(13, "")), ControlPlaneConnect,
			"Cannot reach the Traffic Director API server: Envoy's stream to td:443 ended with gRPC code 13 and no reason, though our own connection works; a firewall may block TCP 443; see the warnings in /var/log/envoy/envoy.err.log"},
		{Envoy{Admin: "127.0.0.1:15000", Err: errors.Join(envoyadmin.ErrRefused), Unit: "activating, auto-restart, exit code 1", LastError: "Proto constraint validation failed (Bootstrap.StaticResources.Clusters[0].Name: value length must be at least 1 characters)"}, EnvoyDown,
			"Envoy is not running: nothing accepts on its admin address 127.0.0.1:15000 (unit activating, auto-restart, exit code 1), last error in its log: Proto constraint validation failed (Bootstrap.StaticResources.Clusters[0].Name: value length must be at least 1 characters); see `systemctl status service-proxy-envoy` and /var/log/envoy/envoy.err.log"},
	} {
		findings := Check(Facts{Envoy: test.envoy, ProxyUser: "envoy"})
		if test.id == "" && len(findings) == 0 {
			continue
		}
		if len(findings) != 1 || findings[0].ID != test.id || findings[0].Text() != test.want {
			t.Errorf("got %+v\nwant %s: %s", findings, test.id, test.want)
		}
	}
}
