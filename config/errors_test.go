package config

import (
	"reflect"
	"strings"
	"testing"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"
)

// An error names the line and the key, and says what is allowed there.
func TestErrors(t *testing.T) {
	for text, want := range map[string]string{
		"version: 2\nexpiration:\n  max_durations: 1h": `line 3: unknown config key "max_durations" ` +
			`(the keys there are database, max_duration, max_running_per_user, delayed_events, restart_grace, rate_limiting)`,
		"expiration: {rate_limiting: {token: {treshold: 1}}}": `line 1: unknown config key "treshold" (the keys there are threshold, cooloff_ms)`,
		"matrix_rtc:\n  transports:\n    - url: x":            `line 3: unknown config key "url" (the keys there are type, livekit_service_url)`,
		"expiration: {database: {a: 1}, b: 2, delayed_events: {c: 3}}": `line 1: unknown config key "a" (the keys there are connection_string, ` +
			`max_open_conns, max_idle_conns, conn_max_lifetime); line 1: unknown config key "b" (the keys there are database, max_duration, ` +
			`max_running_per_user, delayed_events, restart_grace, rate_limiting); line 1: unknown config key "c" (the keys there are max_delay, ` +
			`max_scheduled_per_user, max_scheduled_per_service_user, keep_finalised, max_finalised_per_user)`,

		// Our sections: misspelt, given twice, or in the wrong place.
		"version: 2\nexpirations: {}":                         `line 2: unknown config key "expirations" (did you mean "expiration"?)`,
		"Expiration: {}":                                      `line 1: unknown config key "Expiration" (did you mean "expiration"?)`,
		"expiring_events: {}":                                 `line 1: unknown config key "expiring_events" (did you mean "expiration"?)`,
		"matrix-rtc:":                                         `line 1: unknown config key "matrix-rtc" (did you mean "matrix_rtc"?)`,
		"delayed_event: {max_delay: 1h}":                      `line 1: unknown config key "delayed_event" (did you mean "expiration.delayed_events"?)`,
		"max_duration: 1h":                                    `line 1: unknown config key "max_duration" (did you mean "expiration.max_duration"?)`,
		"transports: []":                                      `line 1: unknown config key "transports" (did you mean "matrix_rtc.transports"?)`,
		"expiration: {}\nversion: 2\nexpiration: {}":          `line 3: config key "expiration" is there for the second time`,
		"expiration:\n  max_duration: 1h\n  max_duration: 2h": `line 3: config key "max_duration" is there for the second time`,

		// Values of the wrong kind, at any place.
		"expiration: []": `line 1: invalid value for config key "expiration": a list (must be a section with keys of its own)`,
		"expiration:\n  rate_limiting: # two\n    - 1":                   `line 3: invalid value for config key "rate_limiting": a list (must be a section with keys of its own)`,
		"expiration: {max_running_per_user: many}":                       `line 1: invalid value for config key "max_running_per_user": many (must be a whole number)`,
		"expiration: {rate_limiting: {enabled: 5}}":                      `line 1: invalid value for config key "enabled": 5 (must be true or false)`,
		"expiration:\n  rate_limiting:\n    token:\n      threshold: {}": `line 4: invalid value for config key "threshold": a section (must be a whole number)`,
		"expiration: {database: {connection_string: [a]}}":               `line 1: invalid value for config key "connection_string": a list (must be text)`,
		"expiration: {database: {conn_max_lifetime: 10m}}":               `line 1: invalid value for config key "conn_max_lifetime": 10m (must be a whole number)`,
		"matrix_rtc: {transports: {}}":                                   `line 1: invalid value for config key "matrix_rtc or transports": a section (must be a list of sections)`,
		"matrix_rtc: {transports: [5]}":                                  `line 1: invalid value for config key "transports": 5 (must be a section with keys of its own)`,
		"matrix_rtc:\n  transports:\n    - type: livekit\n    - 5":       `line 4: invalid value for config key "transports": 5 (must be a section with keys of its own)`,
		"expiration: {max_running_per_user: 5, max_duration: 5, restart_grace: 5s}": `line 1: invalid value for config key ` +
			`"max_running_per_user or max_duration": 5 (must be a duration with its unit, such as 3600s or 1h)`,
		"expiration:\n  max_duration: 5 # seconds":  `line 2: invalid value for config key "max_duration": 5 (must be a duration with its unit, such as 3600s or 1h)`,
		"\"expiration\":\n  'max_duration':\n    5": `line 3: invalid value for config key "max_duration": 5 (must be a duration with its unit, such as 3600s or 1h)`,
		"expiration:\n  max_duration: *none":        `yaml: unknown anchor 'none' referenced`,
		"a: [":                                      "yaml: line 1: did not find expected node content",
	} {
		_, err := parse([]byte(text))
		require.EqualError(t, err, want, text)
	}
}

// Dendrite's own sections are not checked, even where Dendrite is lenient.
func TestDendritesSections(t *testing.T) {
	var dendrite config.Dendrite
	for key := range keysIn("", reflect.TypeOf(dendrite)) {
		require.Empty(t, nearest(key))
	}
	_, err := parse([]byte("x: &limit {threshold: 5}\nglobal: {}\nglobal: {}\nrate_limiting: {}\nexpiration: {rate_limiting: {token: *limit, user: {<<: *limit, threshold: 6}}}"))
	require.NoError(t, err)
}

// keysOf knows the keys of every section.
func TestKeysOf(t *testing.T) {
	for key, section := range keysIn("", reflect.TypeFor[sections]()) {
		if section.Kind() == reflect.Slice || section.Kind() == reflect.Pointer {
			section = section.Elem()
		}
		if section.Kind() != reflect.Struct {
			continue
		}
		var keys []string
		for name := range keysIn("", section) {
			if !strings.Contains(name, ".") {
				keys = append(keys, name)
			}
		}
		require.ElementsMatch(t, keys, keysOf(section.String()), key)
	}
}
