// Package schema holds what the commands print as JSON against docs/NAME.schema.json, for tests.
//
// A schema leaves room for properties that come later. Here it is closed: what is printed has no
// property of which the schema says nothing, and the Go type, the schema and the list of what v1
// has (testdata/NAME.v1.txt) name the same ones.
package schema

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

var widen = flag.Bool("schema.widen", false,
	"add new properties to the lists of what a form has; none is ever taken away")

// folder is the repository: a test runs in its package's folder, and `make` builds with -trimpath,
// so that the place of this file is not known.
func folder(t testing.TB) string {
	t.Helper()
	at, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir := at; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatalf("no go.mod above %s", at)
		}
	}
}

func read(t testing.TB, name string) map[string]any {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder(t), "docs", name+".schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return doc.(map[string]any)
}

var compiled sync.Map // by name

func compile(t testing.TB, name string) *jsonschema.Schema {
	t.Helper()
	if s, ok := compiled.Load(name); ok {
		return s.(*jsonschema.Schema)
	}
	doc := read(t, name)
	closeObjects(doc)
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	if err := c.AddResource(name, doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile(name)
	if err != nil {
		t.Fatal(err)
	}
	compiled.Store(name, s)
	return s
}

// Check says why body is not in the form NAME, nil if it is.
func Check(t testing.TB, name string, body []byte) error {
	t.Helper()
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err != nil {
		return err
	}
	return compile(t, name).Validate(value)
}

// Valid fails where body is not in the form NAME.
func Valid(t testing.TB, name string, body []byte) {
	t.Helper()
	if err := Check(t, name, body); err != nil {
		t.Errorf("%s: %v\n%.2000s", t.Name(), err, body)
	}
}

func closeObjects(doc any) {
	switch v := doc.(type) {
	case map[string]any:
		if _, has := v["additionalProperties"]; v["type"] == "object" && !has {
			v["additionalProperties"] = false
		}
		for _, below := range v {
			closeObjects(below)
		}
	case []any:
		for _, below := range v {
			closeObjects(below)
		}
	}
}

// Properties fails where the type of of and the schema do not have the same properties, where one
// has no description, or where one that v1 had is gone, has another type, or may be missing.
func Properties(t testing.TB, name string, of any) {
	t.Helper()
	doc := read(t, name)
	if doc["$schema"] != "https://json-schema.org/draft/2020-12/schema" {
		t.Errorf("%s: not of draft 2020-12", name)
	}
	described := map[string]string{}
	walker{t, name, doc, described}.object(doc, "")
	typed := map[string]bool{}
	fields(typed, reflect.TypeOf(of), "")
	for _, path := range slices.Sorted(maps.Keys(typed)) {
		if _, has := described[path]; !has {
			t.Errorf("%s: docs/%s.schema.json says nothing of %s", name, name, path)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(described)) {
		if !typed[path] {
			t.Errorf("%s: docs/%s.schema.json has %s, which nothing writes", name, name, path)
		}
	}
	var have []string
	for _, path := range slices.Sorted(maps.Keys(described)) {
		have = append(have, path+described[path])
	}
	held(t, filepath.Join(folder(t), "test", "schema", "testdata", name+".v1.txt"), have)
}

// held fails where a line of the file is not among have, or the other way round.
func held(t testing.TB, file string, have []string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil && !*widen {
		t.Fatal(err)
	}
	had := strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' })
	for _, line := range had {
		if !slices.Contains(have, line) {
			t.Errorf("%s: %q is gone or another one: that would be v2", file, line)
		}
	}
	if *widen && !t.Failed() {
		if err := os.WriteFile(file, []byte(strings.Join(have, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, line := range have {
		if !slices.Contains(had, line) {
			t.Errorf("%s has no %q: add it by -schema.widen, it stays then", file, line)
		}
	}
}

// walker lists the properties of a schema, each with its type and whether it is required.
type walker struct {
	t    testing.TB
	name string
	root map[string]any
	into map[string]string
}

func (w walker) object(schema map[string]any, path string) {
	required, _ := schema["required"].([]any)
	properties, _ := schema["properties"].(map[string]any)
	for name, below := range properties {
		at := strings.TrimPrefix(path+"."+name, ".")
		s := w.resolve(below.(map[string]any))
		if s["description"] == nil {
			w.t.Errorf("%s: %s has no description", w.name, at)
		}
		word := " " + kind(s)
		if slices.Contains(required, any(name)) {
			word += " required"
		}
		w.into[at] = word
		w.below(s, at)
	}
}

func (w walker) below(s map[string]any, path string) {
	if items, ok := s["items"].(map[string]any); ok {
		w.below(w.resolve(items), path+"[]")
	}
	if s["properties"] != nil {
		w.object(s, path)
	}
}

// resolve follows $ref; what stands beside it wins.
func (w walker) resolve(s map[string]any) map[string]any {
	ref, ok := s["$ref"].(string)
	if !ok {
		return s
	}
	defs, _ := w.root["$defs"].(map[string]any)
	to, ok := defs[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
	if !ok {
		w.t.Fatalf("%s: %s leads nowhere", w.name, ref)
	}
	all := maps.Clone(w.resolve(to))
	maps.Copy(all, s)
	return all
}

func kind(s map[string]any) string {
	if word, ok := s["type"].(string); ok {
		return word
	}
	values, _ := s["enum"].([]any)
	if s["const"] != nil {
		values = []any{s["const"]}
	}
	for _, v := range values {
		switch v.(type) {
		case string:
			return "string"
		case json.Number:
			return "integer"
		}
	}
	return "any"
}

// fields lists the properties that a Go type has in JSON.
func fields(into map[string]bool, t reflect.Type, path string) {
	switch t.Kind() {
	case reflect.Pointer:
		fields(into, t.Elem(), path)
	case reflect.Slice, reflect.Array:
		fields(into, t.Elem(), path+"[]")
	case reflect.Struct:
		if t == reflect.TypeFor[time.Time]() {
			return
		}
		for f := range t.Fields() {
			tag, has := f.Tag.Lookup("json")
			name, _, _ := strings.Cut(tag, ",")
			if f.Anonymous && !has {
				fields(into, f.Type, path)
				continue
			}
			if !f.IsExported() || name == "-" {
				continue
			}
			if name == "" {
				panic(fmt.Sprintf("%v.%s has no name in JSON", t, f.Name))
			}
			at := strings.TrimPrefix(path+"."+name, ".")
			into[at] = true
			fields(into, f.Type, at)
		}
	default:
	}
}
