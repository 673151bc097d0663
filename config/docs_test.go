package config

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v2"
)

// documentation returns docs/configuration.md.
func documentation(t *testing.T) string {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "configuration.md"))
	require.NoError(t, err)
	return string(doc)
}

// keysIn returns all keys of a section, and of the sections in it, with the types of their values.
func keysIn(prefix string, section reflect.Type) map[string]reflect.Type {
	keys := map[string]reflect.Type{}
	for i := range section.NumField() {
		key, inner := section.Field(i).Tag.Get("yaml"), section.Field(i).Type
		if key == "-" {
			continue
		}
		keys[prefix+key] = inner
		if inner.Kind() == reflect.Slice || inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		if inner.Kind() == reflect.Struct {
			maps.Copy(keys, keysIn(prefix+key+".", inner))
		}
	}
	return keys
}

// keysOfExample returns all keys of a part of a dendrite.yaml. The keys of a list are those of its last section.
func keysOfExample(prefix string, section yaml.MapSlice) map[string]bool {
	keys := map[string]bool{}
	for _, item := range section {
		key := prefix + item.Key.(string)
		keys[key] = true
		sections := []any{item.Value}
		if list, ok := item.Value.([]any); ok {
			sections = list
		}
		for _, inner := range sections {
			if inner, ok := inner.(yaml.MapSlice); ok {
				maps.Copy(keys, keysOfExample(key+".", inner))
			}
		}
	}
	return keys
}

// The examples in the documentation have every key and no other, and show the defaults.
func TestDocumentedKeys(t *testing.T) {
	var examples []byte
	for _, block := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(documentation(t), -1) {
		examples = append(examples, block[1]...)
	}
	var documented yaml.MapSlice
	require.NoError(t, yaml.Unmarshal(examples, &documented))
	require.ElementsMatch(t, slices.Collect(maps.Keys(keysIn("", reflect.TypeFor[sections]()))),
		slices.Collect(maps.Keys(keysOfExample("", documented))))

	c, err := parse(examples)
	require.NoError(t, err)
	require.Len(t, c.MatrixRTC.Transports, 1)
	c.MatrixRTC.Transports = nil // only this value and the next are not defaults
	require.EqualValues(t, "file:"+sqliteFile, c.Database.ConnectionString)
	c.Database.ConnectionString = ""
	var defaults Config
	defaults.Defaults()
	require.Equal(t, &defaults, c)
}
