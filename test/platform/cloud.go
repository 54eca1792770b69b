package platform

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// GcloudEnv points an unmodified gcloud at this emulator: base is http://ADDRESS:PORT of a listener
// that gcloud reaches, config an empty folder of the test's own. It replaces the whole environment
// but PATH and HOME, so that nothing of the developer's own gcloud counts.
func (e *Emulator) GcloudEnv(base, config, path string) []string {
	return []string{
		"PATH=" + path, "HOME=" + config,
		"CLOUDSDK_CONFIG=" + config,
		"CLOUDSDK_CORE_PROJECT=" + e.vm.ProjectID,
		"CLOUDSDK_COMPUTE_ZONE=" + e.vm.Zone,
		"CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE=" + base + "/",
		"CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING=" + base + "/",
		"CLOUDSDK_AUTH_DISABLE_CREDENTIALS=true",
		"CLOUDSDK_CORE_CHECK_GCE_METADATA=false",
		"CLOUDSDK_CORE_DISABLE_PROMPTS=1",
		"CLOUDSDK_CORE_DISABLE_USAGE_REPORTING=true",
		"CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK=true",
		"CLOUDSDK_SURVEY_DISABLE_PROMPTS=true",
	}
}

// apiError answers as Google's JSON APIs do.
func apiError(w http.ResponseWriter, code int, message string) {
	respond(w, code, map[string]any{"error": map[string]any{
		"code": code, "message": message,
		"status": strings.ToUpper(strings.ReplaceAll(http.StatusText(code), " ", "_")),
		"errors": []any{map[string]any{"message": message, "domain": "global", "reason": "notFound"}},
	}})
}

func respond(w http.ResponseWriter, code int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.WriteHeader(code)
	w.Write(body)
}

// compute is the Compute API: GET
// /compute/v1/projects/P/zones/Z/instances/VM[/getGuestAttributes|/serialPort], POST setMetadata
// there, and what Project.api has. It wants no token, since gcloud is pointed here without one.
func (e *Emulator) compute(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	id, project := e.vm.ProjectID, e.vm.Project
	self := fmt.Sprintf("projects/%s/zones/%s/instances/%s", id, e.vm.Zone, e.vm.Name)
	e.mu.Unlock()
	rest, ok := strings.CutPrefix(r.URL.Path, "/compute/v1/"+self)
	if common, is := strings.CutPrefix(r.URL.Path, "/compute/v1/projects/"+id); is &&
		!strings.HasPrefix(common, "/zones/") {
		project.api(w, r, id, common)
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if ok && rest == "/setMetadata" && r.Method == http.MethodPost {
		if all, ok := setMetadata(w, r, e.changes); ok {
			e.vm.Attributes, e.changes = all, e.changes+1
			e.notify()
			respondDone(w, r, self, fmt.Sprintf("operation-%d", e.changes), "setMetadata")
		}
		return
	}
	if !ok || r.Method != http.MethodGet {
		apiError(w, http.StatusNotFound,
			fmt.Sprintf("The resource '%s' was not found", strings.TrimPrefix(r.URL.Path, "/compute/v1/")))
		return
	}
	switch rest {
	case "":
		respond(w, http.StatusOK, map[string]any{
			"kind": "compute#instance", "id": strconv.FormatUint(e.vm.ID, 10), "name": e.vm.Name,
			"status": "RUNNING", "zone": e.vm.Zone,
			"metadata": asMetadata(e.vm.Attributes, e.changes),
			"networkInterfaces": []any{
				map[string]any{"name": "nic0", "network": "global/networks/" + e.vm.Network,
					"networkIP": e.vm.IP}},
			"serviceAccounts": []any{map[string]any{"email": e.vm.ServiceAccount, "scopes": e.vm.Scopes}},
		})
	case "/getGuestAttributes":
		path := r.URL.Query().Get("queryPath")
		namespace, key, _ := strings.Cut(path, "/")
		items := []any{}
		for _, ns := range slices.Sorted(maps.Keys(e.guest)) {
			if namespace != "" && ns != namespace {
				continue
			}
			for _, k := range slices.Sorted(maps.Keys(e.guest[ns])) {
				if key == "" || k == key {
					items = append(items, map[string]any{"namespace": ns, "key": k, "value": e.guest[ns][k]})
				}
			}
		}
		if len(items) == 0 {
			apiError(w, http.StatusNotFound,
				fmt.Sprintf("The resource '%s/guestAttributes/%s' of type 'Guest Attribute' was not found.",
					self, path))
			return
		}
		respond(w, http.StatusOK, map[string]any{
			"kind": "compute#guestAttributes", "queryPath": path, "queryValue": map[string]any{
				"items": items},
		})
	case "/serialPort":
		start, _ := strconv.Atoi(cmp.Or(r.URL.Query().Get("start"), "0"))
		contents := ""
		if port := cmp.Or(r.URL.Query().Get("port"), "1"); port == "1" && start >= 0 &&
			start < len(e.serial) {
			contents = string(e.serial[start:])
		}
		respond(w, http.StatusOK, map[string]any{
			"kind": "compute#serialPortOutput", "contents": contents,
			"start": strconv.Itoa(start), "next": strconv.Itoa(start + len(contents)),
		})
	default:
		apiError(w, http.StatusNotFound, fmt.Sprintf("The resource '%s%s' was not found", self, rest))
	}
}

// Write appends to serial port 1, as it is read by get-serial-port-output: copy the pty that
// stands for /dev/ttyS0 here.
func (e *Emulator) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.serial = append(e.serial, p...)
	e.notify()
	return len(p), nil
}

// Serial is what came over serial port 1.
func (e *Emulator) Serial() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return string(e.serial)
}

// LogEntry is one entry of Cloud Logging, as far as this project writes them.
type LogEntry struct {
	LogName          string            `json:"logName"`
	Resource         MonitoredResource `json:"resource"`
	Timestamp        time.Time         `json:"timestamp"`
	ReceiveTimestamp time.Time         `json:"receiveTimestamp"`
	Severity         string            `json:"severity,omitempty"`
	InsertID         string            `json:"insertId"`
	Labels           map[string]string `json:"labels,omitempty"`
	JSONPayload      map[string]any    `json:"jsonPayload,omitempty"`
	TextPayload      string            `json:"textPayload,omitempty"`
}

// same says whether two entries are shown as one: those of a log with the same timestamp and
// insertId are duplicates of each other
// (https://cloud.google.com/logging/docs/reference/v2/rest/v2/LogEntry).
func (a LogEntry) same(b LogEntry) bool {
	return a.LogName == b.LogName && a.InsertID == b.InsertID && a.Timestamp.Equal(b.Timestamp)
}

// MonitoredResource is what an entry is about.
type MonitoredResource struct {
	Type   string            `json:"type"`
	Labels map[string]string `json:"labels,omitempty"`
}

// LogEntries lists what was written, in the order it came; what a retry wrote again only once.
func (e *Emulator) LogEntries() []LogEntry {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.logs)
}

// maxLogBody is Cloud Logging's limit for one entries:write.
const maxLogBody = 10 << 20

// logging is POST /v2/entries:write (with the VM's token) and /v2/entries:list (without one, as
// gcloud is pointed here).
func (e *Emulator) logging(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		apiError(w, http.StatusMethodNotAllowed, "method not allowed")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxLogBody))
	if err != nil {
		apiError(w, http.StatusBadRequest, err.Error())
		return
	}
	switch r.URL.Path {
	case "/v2/entries:write":
		if e.authorized(w, r) {
			e.writeEntries(w, body)
		}
	case "/v2/entries:list":
		e.listEntries(w, body)
	default:
		apiError(w, http.StatusNotFound, "method not found: "+r.URL.Path)
	}
}

func (e *Emulator) writeEntries(w http.ResponseWriter, body []byte) {
	var in struct {
		LogName  string            `json:"logName"`
		Resource MonitoredResource `json:"resource"`
		Labels   map[string]string `json:"labels"`
		DryRun   bool              `json:"dryRun"`
		Entries  []LogEntry        `json:"entries"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		apiError(w, http.StatusBadRequest, "Invalid JSON payload received. "+err.Error())
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now().Add(e.offset).UTC()
	for i := range in.Entries {
		entry := &in.Entries[i]
		entry.LogName = cmp.Or(entry.LogName, in.LogName)
		if entry.Resource.Type == "" {
			entry.Resource = in.Resource
		}
		for key, value := range in.Labels {
			if entry.Labels == nil {
				entry.Labels = make(map[string]string)
			}
			if _, ok := entry.Labels[key]; !ok {
				entry.Labels[key] = value
			}
		}
		if !strings.HasPrefix(entry.LogName, "projects/"+e.vm.ProjectID+"/logs/") ||
			entry.Resource.Type == "" {
			apiError(w, http.StatusBadRequest,
				fmt.Sprintf("entry %d: log name %q or resource type %q is invalid", i, entry.LogName,
					entry.Resource.Type))
			return
		}
		if entry.Timestamp.IsZero() {
			entry.Timestamp = now
		}
		entry.ReceiveTimestamp = now
		entry.InsertID = cmp.Or(entry.InsertID, fmt.Sprintf("e%d", len(e.logs)+i))
	}
	if !in.DryRun {
		for _, entry := range in.Entries {
			if !slices.ContainsFunc(e.logs, entry.same) {
				e.logs = append(e.logs, entry)
			}
		}
		e.notify()
	}
	respond(w, http.StatusOK, struct{}{})
}

func (e *Emulator) listEntries(w http.ResponseWriter, body []byte) {
	var in struct {
		ResourceNames []string `json:"resourceNames"`
		Filter        string   `json:"filter"`
		OrderBy       string   `json:"orderBy"`
		PageSize      int      `json:"pageSize"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		apiError(w, http.StatusBadRequest, "Invalid JSON payload received. "+err.Error())
		return
	}
	matches, err := parseFilter(in.Filter)
	if err != nil {
		apiError(w, http.StatusBadRequest, err.Error())
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	out := []LogEntry{}
	if slices.Contains(in.ResourceNames, "projects/"+e.vm.ProjectID) {
		for _, entry := range e.logs {
			if matches(entry) {
				out = append(out, entry)
			}
		}
	}
	slices.SortStableFunc(out, func(a, b LogEntry) int {
		if strings.Contains(in.OrderBy, "desc") {
			a, b = b, a
		}
		return a.Timestamp.Compare(b.Timestamp)
	})
	if in.PageSize > 0 && len(out) > in.PageSize {
		out = out[:in.PageSize] // one page: the tests ask for few
	}
	respond(w, http.StatusOK, map[string]any{"entries": out})
}

var severities = []string{"DEFAULT", "DEBUG", "INFO", "NOTICE", "WARNING", "ERROR", "CRITICAL",
	"ALERT", "EMERGENCY"}

// Comparisons side by side are joined by AND, too.
var comparison = regexp.MustCompile(
	`^\(?\s*([A-Za-z_.]+)\s*(>=|<=|=|:|>|<)\s*("[^"]*"|[^\s")]+)` +
		`(?:\s*\)?\s*AND\s+|\s*\)?\s*$|\s+)`)

// parseFilter understands what this project's documents use: comparisons of logName, severity,
// timestamp, resource.type, resource.labels.X and jsonPayload.X, joined by AND or white space.
func parseFilter(filter string) (func(LogEntry) bool, error) {
	var all []func(LogEntry) bool
	for rest := strings.TrimSpace(filter); rest != ""; {
		m := comparison.FindStringSubmatch(rest)
		if m == nil {
			return nil, fmt.Errorf("the emulator does not understand the filter at %q", rest)
		}
		rest = strings.TrimSpace(rest[len(m[0]):])
		field, op, want := m[1], m[2], strings.Trim(m[3], `"`)
		get, err := fieldOf(field)
		if err != nil {
			return nil, err
		}
		all = append(all, func(e LogEntry) bool {
			got := get(e)
			order := strings.Compare(got, want)
			switch field {
			case "severity":
				order = cmp.Compare(slices.Index(severities, cmp.Or(got, "DEFAULT")),
					slices.Index(severities, want))
			case "timestamp":
				a, errA := time.Parse(time.RFC3339Nano, got)
				b, errB := time.Parse(time.RFC3339Nano, want)
				if errA != nil || errB != nil {
					return false
				}
				order = a.Compare(b)
			}
			switch op {
			case "=":
				return order == 0
			case ":":
				return strings.Contains(strings.ToLower(got), strings.ToLower(want))
			case ">=":
				return order >= 0
			case "<=":
				return order <= 0
			case ">":
				return order > 0
			default:
				return order < 0
			}
		})
	}
	return func(e LogEntry) bool {
		for _, one := range all {
			if !one(e) {
				return false
			}
		}
		return true
	}, nil
}

func fieldOf(field string) (func(LogEntry) string, error) {
	if key, ok := strings.CutPrefix(field, "jsonPayload."); ok {
		return func(e LogEntry) string {
			if v, ok := e.JSONPayload[key]; ok {
				return fmt.Sprint(v)
			}
			return ""
		}, nil
	}
	if key, ok := strings.CutPrefix(field, "resource.labels."); ok {
		return func(e LogEntry) string { return e.Resource.Labels[key] }, nil
	}
	switch field {
	case "logName":
		return func(e LogEntry) string { return e.LogName }, nil
	case "severity":
		return func(e LogEntry) string { return e.Severity }, nil
	case "timestamp":
		return func(e LogEntry) string { return e.Timestamp.Format(time.RFC3339Nano) }, nil
	case "resource.type":
		return func(e LogEntry) string { return e.Resource.Type }, nil
	}
	return nil, fmt.Errorf("the emulator does not know the field %q of a filter", field)
}
