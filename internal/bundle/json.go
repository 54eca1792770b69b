package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// A JSON document is masked by what may stay, and not by what may not: a value that nobody has
// thought of is masked. Structure, numbers, booleans and names of fields stay.

// policy says what stays of a document.
type policy struct {
	// open are the fields whose value anybody may have made up, with its names: all of it is masked.
	open map[string]bool
	// text is what stays of a string; where are the names of the fields that it is in.
	text func(where []string, s string) string
}

const maxDepth = 200 // of JSON; Envoy's protobuf allows 100 messages

// Config masks what Envoy tells of its configuration, as JSON.
func Config(in []byte) ([]byte, error) { return maskJSON(in, policy{openOfConfig, keptOfConfig}) }

// Attribute masks the text of the VM's gce-service-proxy attribute.
func Attribute(in []byte) ([]byte, error) {
	return maskJSON(in, policy{set("labels"), func(where []string, s string) string {
		if keptOfAttribute[where[len(where)-1]] {
			return clean(s)
		}
		return mask(s)
	}})
}

// Told masks JSON of our own, in which strings are for people.
func Told(in []byte) ([]byte, error) {
	return maskJSON(in, policy{set("labels Labels"),
		func(_ []string, s string) string { return Secrets(s) }})
}

// maskJSON writes a document anew, without what the policy does not keep. Of one that is cut off,
// or no JSON from some place on, it writes what is before, and closes what is open: with an error.
func maskJSON(in []byte, p policy) ([]byte, error) {
	m := masking{policy: p, decoder: json.NewDecoder(bytes.NewReader(in)),
		names: map[string]string{}}
	m.decoder.UseNumber()
	err := m.document()
	for len(m.within) > 0 {
		if m.named { // a field whose value is missing
			m.out.WriteString("null")
			m.named = false
		}
		m.end(map[json.Delim]json.Delim{'{': '}', '[': ']'}[m.within[len(m.within)-1].kind])
	}
	m.out.WriteByte('\n')
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return m.out.Bytes(), err
}

// masking is a document on its way.
type masking struct {
	policy
	decoder *json.Decoder
	out     bytes.Buffer
	within  []container
	where   []string // names of the fields that the next value is in
	named   bool     // a field's name was written, and its value is next
	// names are what is written of the names of fields: there are few, each many times.
	names map[string]string
}

// container is an object or array that is open.
type container struct {
	kind  json.Delim
	items int
	depth int  // of where outside it
	open  bool // anything in it is masked
}

func (m *masking) document() error {
	for {
		token, err := m.decoder.Token()
		if err != nil {
			return err
		}
		if err := m.take(token); err != nil {
			return err
		}
		if len(m.within) == 0 {
			if _, err := m.decoder.Token(); !errors.Is(err, io.EOF) {
				return errors.New("more than one value")
			}
			return nil
		}
	}
}

func (m *masking) take(token json.Token) error {
	delim, isDelim := token.(json.Delim)
	if isDelim && (delim == '}' || delim == ']') {
		m.end(delim)
		return nil
	}
	in := &container{}
	if len(m.within) > 0 {
		in = &m.within[len(m.within)-1]
	}
	if in.kind == '{' && !m.named {
		name, _ := token.(string) // it is one: the decoder takes nothing else here
		m.line(in)
		written, known := m.names[name]
		if !known {
			written = quoted(nameOf(name))
			m.names[strings.Clone(name)] = written
		}
		m.out.WriteString(written)
		m.out.WriteString(": ")
		m.where, m.named = append(m.where[:in.depth], name), true
		return nil
	}
	if in.kind == '[' {
		m.line(in)
	}
	m.named = false
	if isDelim {
		if len(m.within) == maxDepth {
			return fmt.Errorf("more than %d values within each other", maxDepth)
		}
		open := in.open || in.kind == '{' && m.open[m.where[len(m.where)-1]]
		m.out.WriteByte(byte(delim))
		m.within = append(m.within, container{kind: delim, depth: len(m.where), open: open})
		return nil
	}
	m.value(token, in.open)
	return nil
}

// value writes a value that is none of several.
func (m *masking) value(token json.Token, open bool) {
	s, isText := token.(string)
	switch {
	case token == nil:
		m.out.WriteString("null")
	case isText && (open || len(m.where) == 0 || m.open[m.where[len(m.where)-1]]):
		m.write(mask(s))
	case isText:
		m.write(m.text(m.where, s))
	case open:
		m.write("[masked]")
	default:
		fmt.Fprint(&m.out, token) // a number, as it was written, or a boolean
	}
}

func (m *masking) line(in *container) {
	if in.items++; in.items > 1 {
		m.out.WriteByte(',')
	}
	m.newLine()
}

func (m *masking) newLine() {
	m.out.WriteByte('\n')
	for range m.within {
		m.out.WriteByte(' ')
	}
}

func (m *masking) end(delim json.Delim) {
	was := m.within[len(m.within)-1]
	m.within, m.where = m.within[:len(m.within)-1], m.where[:was.depth]
	if was.items > 0 {
		m.newLine()
	}
	m.out.WriteByte(byte(delim))
}

func (m *masking) write(s string) { m.out.WriteString(quoted(s)) }

func quoted(s string) string {
	text, _ := json.Marshal(s) // of a string it cannot fail
	return string(text)
}

func mask(s string) string {
	if s == "" {
		return s
	}
	return fmt.Sprintf("[masked, %d bytes]", len(s))
}

// plainName are the names of fields as people make them: what else is one may be a value, in a map.
var plainName = pattern(`^[A-Za-z0-9_.@/:-]{1,128}$`)

func nameOf(s string) string {
	if !plainName().MatchString(s) || Secrets(s) != s {
		return mask(s)
	}
	return s
}

// maxKept is how long a string that stays may be: names are shorter.
const maxKept = 1024

// user is a user with a password before a host.
var user = pattern(`^[^\s/@:]*:[^\s/@]*@`)

// clean is what stays of a name, address or path: it has no query and no user.
func clean(s string) string {
	if len(s) > maxKept {
		return mask(s)
	}
	if s = Secrets(s); strings.Contains(s, "@") {
		s = user().ReplaceAllString(s, redaction.Mark+"@")
	}
	if i := strings.IndexAny(s, "?#"); i >= 0 {
		s = s[:i] + redaction.Mark
	}
	return s
}

func set(words string) map[string]bool {
	all := map[string]bool{}
	for _, word := range strings.Fields(words) {
		all[word] = true
	}
	return all
}

// openOfConfig are the fields of Envoy's types that are google.protobuf.Struct, or a map of what
// people write, and "value" where it is not a string: of an extension that Envoy has no type for.
var openOfConfig = set(`metadata filter_metadata typed_filter_metadata fields struct_value
	list_value value labels json_format static_layer runtime dynamic_parameters params string_map
	environment_variables key_values vm_config`)

// The strings of a configuration that stay, by the names of their fields: they name things, say
// where something is, and which of some words of Envoy's it is.
var keptConfig = set(`
	@type type_url type_urls name id version_info version category
	address address_prefix server_names application_protocols transport_protocol resolver_name
	domains cluster cluster_name service_name route_config_name stat_prefix alt_stat_name
	eds_cluster_name cluster_header hostname server_name host_rewrite_literal sni alpn_protocols
	target_uri authority filename region zone sub_zone user_agent_name user_agent_version
	header_name runtime_key cipher_suites ecdh_curves resource_names filter_name
	config_path log_level log_path service_cluster service_node service_zone
`)

// keptBelow are those that stay in one kind of message only: what contains it is named first.
var keptBelow = set(`
	match.prefix match.path match.path_separated_prefix route.prefix_rewrite header.key
	typed_config.path pipe.path http_health_check.path address.path
`)

var (
	// A word of an enumeration. A key made of capital letters and digits is none.
	enumeration = pattern(`^[A-Z]{1,24}[0-9]{0,2}(_[A-Z0-9]{1,24}){0,8}$`)
	// Numbers of 64 bits, durations and times are strings in protobuf's JSON.
	figure = pattern(`^(-?\d{1,20}(\.\d{1,9})?s?|` +
		`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z|\d{1,6}(\.\d{1,6})?%)$`)
)

// valueFields hold what people wrote, whatever it looks like.
var valueFields = set(`value string_value inline_string inline_bytes inline_code exact
	prefix suffix contains regex exact_match prefix_match suffix_match contains_match password
	username body text text_format format source_code literal binary raw_value substitution
	default default_value key keys json_key`)

// secretField is a field that says of itself that it holds a secret.
var secretField = pattern(`(?i)` + secretly)

func keptOfConfig(where []string, s string) string {
	name := where[len(where)-1]
	below := name
	if len(where) > 1 {
		below = where[len(where)-2] + "." + name
	}
	switch {
	case keptConfig[name], keptBelow[below]:
		return clean(s)
	case below == "error_state.details":
		return Secrets(redaction.Text(s))
	case valueFields[name]:
		return mask(s)
	case (enumeration().MatchString(s) || figure().MatchString(s)) && !secretField().MatchString(name):
		return s
	}
	return mask(s)
}

var keptOfAttribute = set(`api-version exclude-outbound-ip-ranges
	exclude-outbound-port-ranges tracing access-log network scope mesh project-number primary-source
	secondary-source`)
