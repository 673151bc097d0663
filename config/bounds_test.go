package config

import (
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Every number and every duration has bounds. The table in the documentation lists them, and the test tries values on both sides of each.
func TestBounds(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| `(.*)` \\| (\\S+)(?: \\(.*\\))? \\| (\\S+) \\| (\\S+) \\|$").FindAllStringSubmatch(documentation(t), -1)
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
			_, err := parse([]byte(text))
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
	var numbers []string
	for key, field := range keysIn("", reflect.TypeFor[Config]()) {
		if kind := field.Kind(); kind == reflect.Int || kind == reflect.Int64 {
			numbers = append(numbers, key)
		}
	}
	require.ElementsMatch(t, numbers, documented)
}
