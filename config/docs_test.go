package config

import (
	"cmp"
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

// The examples in the documentation, with the table of the keys of livekit, have every key and no other. The examples show the defaults.
func TestDocumentedKeys(t *testing.T) {
	documented := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `livekit\\.(\\w+)` \\|").FindAllStringSubmatch(documentation(t), -1) {
		documented["matrix_rtc.livekit."+row[1]] = true
	}
	var defaults, examples Config
	defaults.Defaults()
	for _, block := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(documentation(t), -1) {
		var keys yaml.MapSlice
		require.NoError(t, yaml.Unmarshal([]byte(block[1]), &keys))
		maps.Copy(documented, keysOfExample("", keys))
		c, err := parse([]byte(block[1]))
		require.NoError(t, err)
		// Only these values are not defaults.
		examples.Database.ConnectionString += c.Database.ConnectionString
		examples.MatrixRTC.Transports = append(examples.MatrixRTC.Transports, c.MatrixRTC.Transports...)
		examples.MatrixRTC.LiveKit = cmp.Or(examples.MatrixRTC.LiveKit, c.MatrixRTC.LiveKit)
		c.Database.ConnectionString, c.MatrixRTC = "", MatrixRTC{}
		require.Equal(t, &defaults, c)
	}
	require.ElementsMatch(t, slices.Collect(maps.Keys(keysIn("", reflect.TypeFor[sections]()))), slices.Collect(maps.Keys(documented)))
	require.EqualValues(t, "file:"+sqliteFile, examples.Database.ConnectionString)
	require.Len(t, examples.MatrixRTC.Transports, 1)
	require.NotNil(t, examples.MatrixRTC.LiveKit)
}
