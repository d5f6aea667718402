-- The next new entries of one stream for its group, unless entries before them were trimmed while nobody had read them.
--
-- Looking and reading are one step: between two, the producer could trim what was just counted as there.
--
-- KEYS: stream
-- ARGV: group, consumer, whether to look (1|0), most entries, most bytes after which no further ones are added, step
-- Reply: {'LOST', id of the last entry delivered, id of the first entry that is there or '', last id the stream gave,
--   how many are missing, how many were removed from the stream so far} or {'OK', entry …}
local function named(list)
  local names = {}
  for i = 1, #list, 2 do names[list[i]] = list[i + 1] end
  return names
end
-- A number of 20 digits does not fit into Lua's.
local function before(a, b)
  local a_ms, a_seq = a:match('^(%d+)-(%d+)$')
  local b_ms, b_seq = b:match('^(%d+)-(%d+)$')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  if #a_seq ~= #b_seq then return #a_seq < #b_seq end
  return a_seq < b_seq
end

if ARGV[3] == '1' and redis.call('EXISTS', KEYS[1]) == 1 then
  local stream = named(redis.call('XINFO', 'STREAM', KEYS[1]))
  for _, each in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = named(each)
    local added, read = tonumber(stream['entries-added'] or nil), tonumber(group['entries-read'] or nil)
    if group.name == ARGV[1] and added and read then
      local removed, last = added - stream.length, stream['last-generated-id']
      local first = stream['first-entry'] and stream['first-entry'][1] or ''
      if removed > read and before(group['last-delivered-id'], first ~= '' and first or last) then
        return {'LOST', group['last-delivered-id'], first, last, removed - read, removed}
      end
    end
  end
end

local most, bytes, found = tonumber(ARGV[4]), tonumber(ARGV[5]), {'OK'}
while #found - 1 < most and bytes > 0 do
  local count = math.min(tonumber(ARGV[6]), most - #found + 1)
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', count, 'STREAMS', KEYS[1], '>')
  local entries = reply and reply[1] and reply[1][2] or {}
  for _, entry in ipairs(entries) do
    found[#found + 1] = entry
    for _, text in ipairs(entry[2] or {}) do bytes = bytes - #text end
  end
  if #entries < count then break end
end
return found
