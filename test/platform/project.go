package platform

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Project is what the VMs of one project share: its metadata, which each VM's metadata server shows
// under project/attributes/. Its methods may be called from several goroutines.
type Project struct {
	mu         sync.Mutex
	attributes map[string]string
	changes    int // of the metadata: its fingerprint
	operations int
	members    []*Emulator
}

// NewProject makes one without metadata and without VMs. Give it to them (VM.Project).
func NewProject() *Project { return &Project{attributes: map[string]string{}} }

// join makes e one of the project's VMs.
func (p *Project) join(e *Emulator) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.members = append(p.members, e)
}

// SetAttribute sets a key of the project's metadata. Long polls of all its VMs see it.
func (p *Project) SetAttribute(key, value string) {
	p.change(func(all map[string]string) { all[key] = value })
}

// DeleteAttribute removes one.
func (p *Project) DeleteAttribute(key string) {
	p.change(func(all map[string]string) { delete(all, key) })
}

// Attributes are the project's.
func (p *Project) Attributes() map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.attributes)
}

func (p *Project) change(do func(all map[string]string)) {
	p.mu.Lock()
	do(p.attributes)
	p.changes++
	members := slices.Clone(p.members)
	p.mu.Unlock()
	for _, e := range members {
		e.Update(func(*VM) {})
	}
}

// The metadata of a project or an instance in the Compute API's form
// (https://cloud.google.com/compute/docs/reference/rest/v1/projects/setCommonInstanceMetadata,
// .../instances/setMetadata): a list of all items, which replaces the one there if its
// fingerprint is still the one that was read.
type apiMetadata struct {
	Kind        string    `json:"kind"`
	Fingerprint string    `json:"fingerprint"`
	Items       []apiItem `json:"items,omitempty"`
}

type apiItem struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

func asMetadata(all map[string]string, changes int) apiMetadata {
	m := apiMetadata{Kind: "compute#metadata", Fingerprint: fmt.Sprintf("f%d=", changes)}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		m.Items = append(m.Items, apiItem{key, all[key]})
	}
	return m
}

// setMetadata reads a request that replaces metadata which has changed so often, and answers what
// is wrong with it; ok: nothing is.
func setMetadata(w http.ResponseWriter, r *http.Request, changes int) (
	all map[string]string, ok bool) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	var m apiMetadata
	if err == nil {
		err = json.Unmarshal(body, &m)
	}
	switch now := asMetadata(nil, changes).Fingerprint; {
	case err != nil:
		apiError(w, http.StatusBadRequest, err.Error())
		return nil, false
	case m.Fingerprint != now:
		apiError(w, http.StatusPreconditionFailed,
			"Supplied fingerprint does not match current metadata fingerprint.")
		return nil, false
	}
	all = make(map[string]string, len(m.Items))
	for _, item := range m.Items {
		all[item.Key] = item.Value
	}
	return all, true
}

// api is what the Compute API has of a project: reading it, replacing its metadata, and the
// operations that come of that, which are done at once.
func (p *Project) api(w http.ResponseWriter, r *http.Request, id, rest string) {
	p.mu.Lock()
	changes, all := p.changes, maps.Clone(p.attributes)
	p.mu.Unlock()
	operation, isOperation := strings.CutPrefix(rest, "/global/operations/")
	switch {
	case rest == "" && r.Method == http.MethodGet:
		respond(w, http.StatusOK, map[string]any{
			"kind": "compute#project", "name": id, "commonInstanceMetadata": asMetadata(all, changes),
		})
	case rest == "/setCommonInstanceMetadata" && r.Method == http.MethodPost:
		next, ok := setMetadata(w, r, changes)
		if !ok {
			return
		}
		p.change(func(all map[string]string) {
			clear(all)
			maps.Copy(all, next)
		})
		p.mu.Lock()
		p.operations++
		name := fmt.Sprintf("operation-%d", p.operations)
		p.mu.Unlock()
		respondDone(w, r, "projects/"+id, name, "setMetadata")
	case isOperation:
		respondDone(w, r, "projects/"+id, strings.TrimSuffix(operation, "/wait"), "setMetadata")
	default:
		apiError(w, http.StatusNotFound,
			fmt.Sprintf("The resource 'projects/%s%s' was not found", id, rest))
	}
}

// respondDone answers with an operation that has ended.
func respondDone(w http.ResponseWriter, r *http.Request, target, name, kind string) {
	base := "http://" + r.Host + "/compute/v1/"
	respond(w, http.StatusOK, map[string]any{
		"kind": "compute#operation", "name": name, "operationType": kind, "status": "DONE",
		"progress": 100, "targetLink": base + target,
		"selfLink": base + target + "/global/operations/" + name,
	})
}
