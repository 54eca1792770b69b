package cloudlog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
)

// vm is what entries say of the VM.
type vm struct {
	project, zone, id string
	labels            map[string]string
}

// What allows a VM to write entries, below https://www.googleapis.com/auth/.
var scopes = []string{"cloud-platform", "logging.write", "logging.admin"}

var errScope = errors.New("none of the VM's scopes allows it; give it logging.write or " +
	"cloud-platform")

const account = "instance/service-accounts/default/"

// readVM asks the metadata server, on demand for the scopes too. Errors: errScope, those of read.
func readVM(ctx context.Context, read func(context.Context, string) ([]byte, error),
	scoped bool) (*vm, error) {
	var failed error
	get := func(path string) string {
		if failed != nil {
			return ""
		}
		text, err := read(ctx, path)
		if missing := new(metadata.Error); errors.As(err, &missing) &&
			missing.Code == http.StatusNotFound && (path == createdBy || path == account+"scopes") {
			return "" // a VM of no group, or without an account
		}
		failed = err
		return strings.TrimSpace(string(text))
	}
	if scoped {
		has := strings.Fields(get(account + "scopes"))
		if failed == nil && !slices.ContainsFunc(scopes, func(s string) bool {
			return slices.Contains(has, "https://www.googleapis.com/auth/"+s)
		}) {
			return nil, errScope
		}
	}
	v := &vm{project: get("project/project-id"), id: get("instance/id"),
		labels: map[string]string{"instance_name": get("instance/name")}}
	zone := get("instance/zone") // projects/NUMBER/zones/ZONE
	v.zone = zone[strings.LastIndexByte(zone, '/')+1:]
	v.addGroup(get(createdBy))
	if failed == nil && (v.project == "" || v.id == "" || v.zone == "") {
		failed = errors.New("the metadata server does not say which VM this is")
	}
	if failed != nil {
		return nil, failed
	}
	return v, nil
}

// createdBy is projects/NUMBER/zones/ZONE/instanceGroupManagers/NAME, or regions/REGION, on a VM of
// a managed instance group:
// https://cloud.google.com/compute/docs/instance-groups/getting-info-about-migs
const createdBy = "instance/attributes/created-by"

// addGroup adds the labels of the VM's group, by the names that Google's guest agent and Ops Agent
// use.
func (v *vm) addGroup(by string) {
	part := strings.Split(by, "/")
	if len(part) != 6 || part[0] != "projects" || part[4] != "instanceGroupManagers" {
		return
	}
	const prefix = "compute.googleapis.com/instance_group_manager/"
	switch part[2] {
	case "zones":
		v.labels[prefix+"zone"] = part[3]
	case "regions":
		v.labels[prefix+"region"] = part[3]
	default:
		return
	}
	v.labels[prefix+"name"] = part[5]
}

// onCompute says whether there should be a metadata server: it was named, or the firmware says so
// (as cloud.google.com/go/compute/metadata decides, OnGCE).
func onCompute() bool {
	name, err := os.ReadFile("/sys/class/dmi/id/product_name")
	return os.Getenv(metadata.HostEnv) != "" || err == nil && strings.HasPrefix(string(name), "Google")
}

// token is an access token of the VM's service account.
type token struct {
	text string
	till time.Time // to be asked for again then
}

// The metadata server has a new one five minutes before the old one ends
// (https://cloud.google.com/compute/docs/access/authenticate-workloads#applications).
const tokenMargin = 4 * time.Minute

// accessToken is the token to ask with, out of memory or from the metadata server.
func (w *Writer) accessToken(ctx context.Context) (string, error) {
	now := time.Now()
	if t := w.run.token; t.text != "" && now.Before(t.till) {
		return t.text, nil
	}
	answer, err := w.read(ctx, account+"token")
	if err != nil {
		return "", fmt.Errorf("get a token: %w", err)
	}
	var parsed struct {
		Text      string  `json:"access_token"`
		ExpiresIn float64 `json:"expires_in"` // seconds
	}
	// A header takes no line break; the answer itself is never told.
	if err := json.Unmarshal(answer, &parsed); err != nil || parsed.Text == "" ||
		strings.ContainsFunc(parsed.Text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errors.New("get a token: the metadata server's answer cannot be read")
	}
	lasts := time.Duration(min(max(parsed.ExpiresIn, 0), 24*3600) * float64(time.Second))
	w.run.token = token{parsed.Text, now.Add(lasts - tokenMargin)}
	return parsed.Text, nil
}
