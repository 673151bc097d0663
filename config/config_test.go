package config

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// What is refused, and how, is tested on the real binary, in test/integration.

func TestDefaults(t *testing.T) {
	for _, yaml := range []string{"", "version: 2\n", "expiration:\n", "expiration: {}\n"} {
		c, err := parseConfig([]byte(yaml))
		require.NoError(t, err)
		require.Equal(t, 24*time.Hour, c.MaxDuration)
		require.Equal(t, 100, c.MaxRunningPerUser)
		require.Zero(t, c.RestartGrace)
		require.True(t, c.RateLimiting.Enabled)
		require.Empty(t, c.Database.ConnectionString)
	}
	c, err := parseConfig([]byte("expiration: {rate_limiting: {token: {threshold: 7}}, max_duration: 1h}"))
	require.NoError(t, err)
	require.Equal(t, RateLimit{Threshold: 7, CooloffMS: 1000}, c.RateLimiting.Token, "what is not named keeps its default")
	require.Equal(t, time.Hour, c.MaxDuration)
}

func TestRateLimitingSwitchedOff(t *testing.T) {
	for _, enabled := range []bool{true, false} {
		c, err := parseConfig(fmt.Appendf(nil, "expiration: {rate_limiting: {enabled: %t, token: {threshold: 7}, unknown_token: {threshold: 8}, user: {threshold: 9}}}", enabled))
		require.NoError(t, err)
		component, routes := c.Components()
		var token, unknown, user expiration.RateLimit
		if enabled {
			token = expiration.RateLimit{Threshold: 7, Cooloff: time.Second}
			unknown = expiration.RateLimit{Threshold: 8, Cooloff: time.Second}
			user = expiration.RateLimit{Threshold: 9, Cooloff: time.Second}
		}
		require.Equal(t, token, component.TokenLimit)
		require.Equal(t, unknown, routes.UnknownTokens)
		require.Equal(t, user, routes.UserRequests)
	}
}

// The example in the documentation is complete, and shows the defaults.
func TestDocumentedExample(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "configuration.md"))
	require.NoError(t, err)
	example := regexp.MustCompile("(?s)```yaml\n(expiration:.*?)```").FindSubmatch(doc)
	require.NotNil(t, example)
	c, err := parseConfig(example[1])
	require.NoError(t, err)
	var defaults Config
	defaults.Defaults()
	defaults.Database.ConnectionString = "file:dendrite_expiration.db"
	require.Equal(t, &defaults, c)
}

// Every number and every duration has bounds. The table in the documentation names them, and each is reached from both sides.
func TestBounds(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "configuration.md"))
	require.NoError(t, err)
	rows := regexp.MustCompile("(?m)^\\| `(.*)` \\| (\\S+)(?: \\(.*\\))? \\| (\\S+) \\| (\\S+) \\|$").FindAllStringSubmatch(string(doc), -1)
	var documented []string
	for _, row := range rows {
		key, isDuration := row[1], false
		documented = append(documented, key)
		number := func(text string) int64 {
			if n, err := strconv.ParseInt(text, 10, 64); err == nil {
				return n
			}
			isDuration = true
			d, err := time.ParseDuration(text)
			require.NoError(t, err, key)
			return int64(d)
		}
		least, most, step := number(row[2]), number(row[3]), number(row[4])
		set := func(value int64) error {
			text := strconv.FormatInt(value, 10)
			if isDuration {
				text = time.Duration(value).String()
			}
			for _, part := range slices.Backward(strings.Split("expiration."+key, ".")) {
				text = "{" + part + ": " + text + "}"
			}
			_, err := parseConfig([]byte(text))
			return err
		}
		require.NoError(t, set(least), key)
		require.NoError(t, set(most), key)
		refused := []int64{least - step, most + step, math.MaxInt64, math.MinInt64}
		if step > 1 {
			refused = append(refused, least+1, most-1)
		}
		for _, value := range refused {
			err := set(value)
			require.ErrorContains(t, err, `"expiration.`+key+`"`, "%d", value)
			require.ErrorContains(t, err, "from "+row[2]+" to "+row[3], "the error says what is allowed")
		}
	}
	slices.Sort(documented)
	numbers := numbersOf("", reflect.TypeFor[Config]())
	slices.Sort(numbers)
	require.Equal(t, numbers, documented)
}

// numbersOf returns the keys of all numbers and durations in a section.
func numbersOf(prefix string, section reflect.Type) (keys []string) {
	for i := range section.NumField() {
		field := section.Field(i)
		switch key := prefix + field.Tag.Get("yaml"); {
		case field.Tag.Get("yaml") == "-":
		case field.Type.Kind() == reflect.Struct:
			keys = append(keys, numbersOf(key+".", field.Type)...)
		case field.Type.Kind() == reflect.Int, field.Type.Kind() == reflect.Int64:
			keys = append(keys, key)
		}
	}
	return keys
}

// So is the example of the transports, but for their defaults: there are none.
func TestDocumentedTransports(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "configuration.md"))
	require.NoError(t, err)
	example := regexp.MustCompile("(?s)```yaml\n(matrix_rtc:.*?)```").FindSubmatch(doc)
	require.NotNil(t, example)
	c, err := parseConfig(example[1])
	require.NoError(t, err)
	require.Len(t, c.MatrixRTC.Transports, 1)
	value := reflect.ValueOf(c.MatrixRTC.Transports[0])
	for i := range value.NumField() {
		require.NotZero(t, value.Field(i).Interface(), value.Type().Field(i).Name)
	}
}

func TestWhichDatabase(t *testing.T) {
	sqlite := func(c *config.Dendrite) {
		c.RoomServer.Database.ConnectionString = "file:/var/lib/dendrite_roomserver.db"
	}
	for name, test := range map[string]struct {
		own  config.DataSource
		rest func(*config.Dendrite)
		want config.DataSource
	}{
		"its own":           {"file:mine.db", sqlite, "file:mine.db"},
		"beside the others": {"", sqlite, "file:/var/lib/dendrite_expiration.db"},
		"in the current folder": {"", func(c *config.Dendrite) { c.RoomServer.Database.ConnectionString = "file:roomserver.db" },
			"file:dendrite_expiration.db"},
		"the global one": {"", func(c *config.Dendrite) {
			c.Global.DatabaseOptions.ConnectionString = "postgres://host/dendrite"
		}, ""},
		"beside a global SQLite file": {"", func(c *config.Dendrite) {
			c.Global.DatabaseOptions.ConnectionString = "file:///data/all.db"
		}, "file:///data/dendrite_expiration.db"},
		"the roomserver's": {"", func(c *config.Dendrite) {
			c.RoomServer.Database.ConnectionString = "postgres://host/roomserver"
		}, "postgres://host/roomserver"},
	} {
		t.Run(name, func(t *testing.T) {
			var (
				rest config.Dendrite
				c    Config
			)
			c.Defaults()
			c.Database.ConnectionString = test.own
			test.rest(&rest)
			require.NoError(t, c.resolveDatabase(&rest))
			require.Equal(t, test.want, c.Database.ConnectionString)
		})
	}
	var rest config.Dendrite
	sqlite(&rest)
	c := Config{Database: rest.RoomServer.Database}
	require.ErrorContains(t, c.resolveDatabase(&rest), "expiration.database.connection_string", "one file for two")
}
