package config

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A duration needs a unit.
func TestDurationsHaveUnits(t *testing.T) {
	for _, key := range []string{"max_duration", "delayed_events.max_delay", "delayed_events.keep_finalised", "restart_grace"} {
		for value, shown := range map[string]string{
			"3600": "3600", "1.5": "1.5", "-1": "-1", "long": "long", "'3600'": "3600", "[1h]": "a list", "{h: 1}": "a section", "true": "true",
			"3600000000000": "3600000...",
		} {
			section, name, nested := strings.Cut(key, ".")
			text := "expiration:\n  " + section + ": " + value
			if nested {
				text = "expiration:\n  " + section + ":\n    " + name + ": " + value
			} else {
				name = section
			}
			_, err := parse([]byte(text))
			require.ErrorContains(t, err, `invalid value for config key "`+name+`": `+shown+` (must be a duration with its unit, such as 3600s or 1h)`)
		}
	}
	_, err := parse([]byte("expiration: {restart_grace: 0}"))
	require.NoError(t, err, "nothing is nothing in each unit")
}
